"""Tasks for the final figures, on which nothing is chosen: other data, and wider and deeper networks."""

from gmn_optim.tasks.byte_transformer import ByteTransformerTask
from gmn_optim.tasks.data_folder import load_cifar10, load_digits, load_fashion_mnist, load_mnist
from gmn_optim.tasks.datasets import load_photograph, load_text
from gmn_optim.tasks.image_cnn import ImageCNNTask
from gmn_optim.tasks.image_fit import ImageFitTask
from gmn_optim.tasks.image_mlp import ImageMLPTask
from gmn_optim.tasks.image_regression import AutoencoderTask, InpaintingTask
from gmn_optim.tasks.named_tasks import Builder, register_tasks
from gmn_optim.tasks.tabular_mlp import TabularMLPTask

META_TEST_TASKS: dict[str, Builder] = {
    "mnist-mlp-784-128": lambda folder: ImageMLPTask(load_mnist(folder), (128,), horizon=1_000),
    "mnist14-mlp-64-64-64-64": lambda folder: ImageMLPTask(load_mnist(folder, 14), (64,) * 4, horizon=1_000),
    "mnist8-mlp-32": lambda folder: ImageMLPTask(load_mnist(folder, 8), (32,), horizon=1_000),
    "mnist-autoencoder": lambda folder: AutoencoderTask(load_mnist(folder), (128, 32, 128), horizon=500),
    "fashion-mnist-mlp-784-256-128": lambda folder: ImageMLPTask(load_fashion_mnist(folder), (256, 128), 128, 1_000),
    "fashion-mnist-cnn": lambda folder: ImageCNNTask(
        load_fashion_mnist(folder), (16, 32), "max", "flatten", horizon=500
    ),
    "cifar10-8x8-mlp": lambda folder: ImageMLPTask(load_cifar10(folder, 8), (32,), horizon=2_000),
    "cifar10-16x16-cnn": lambda folder: ImageCNNTask(
        load_cifar10(folder, 16), (32, 64, 160), image_channels=3, horizon=500
    ),
    "cifar10-16x16-inpainting": lambda folder: InpaintingTask(load_cifar10(folder, 16), (128, 128), horizon=500),
    "digits-mlp": lambda _: TabularMLPTask(load_digits(), (64, 32), batch_size=64),
    "astronaut-siren": lambda _: ImageFitTask(load_photograph("astronaut"), (128,) * 3, batch_size=256, horizon=500),
    "milton-transformer": lambda _: ByteTransformerTask(
        load_text("milton"), width=96, heads=4, blocks=2, context=48, horizon=500
    ),
}
"""What makes each of them, by name; those of MNIST, the whole of Fashion-MNIST and CIFAR-10 need a data folder."""

register_tasks(META_TEST_TASKS)
