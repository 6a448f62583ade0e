"""The learned update rule, a pure function of parameters, gradients, neurons and state."""

from gmn_optim.rule import controller as controller
from gmn_optim.rule import eigenbasis_body as eigenbasis_body
from gmn_optim.rule import kronecker as kronecker
from gmn_optim.rule import schedule_free as schedule_free
from gmn_optim.rule.clock import RefreshClock as RefreshClock
from gmn_optim.rule.config import RuleConfig as RuleConfig
from gmn_optim.rule.layout import Chunk as Chunk
from gmn_optim.rule.layout import Layout as Layout
from gmn_optim.rule.layout import Segment as Segment
from gmn_optim.rule.layout import build_chunks as build_chunks
from gmn_optim.rule.update import RuleState as RuleState
from gmn_optim.rule.update import UpdateRule as UpdateRule
