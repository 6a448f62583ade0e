"""Steps between two looks at the factors, in place and in few operations, where numbers are free to be read."""

from gmn_optim.between_looks.steps import StepsBetweenLooks as StepsBetweenLooks
