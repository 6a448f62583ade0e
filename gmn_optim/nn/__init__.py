"""Equivariant networks on sets of gradients, usable by themselves."""

from gmn_optim.nn.gradmetanet import GradMetaNet as GradMetaNet
from gmn_optim.nn.gradmetanet import GradMetaNetConfig as GradMetaNetConfig
from gmn_optim.nn.neuron_encoding import NeuronEncoding as NeuronEncoding
from gmn_optim.nn.product import LayerFeatures as LayerFeatures
from gmn_optim.nn.product import ProductLayer as ProductLayer
from gmn_optim.nn.set_layers import DeepSets as DeepSets
from gmn_optim.nn.set_layers import InteractionsAcrossSets as InteractionsAcrossSets
from gmn_optim.nn.set_layers import SetPooling as SetPooling
