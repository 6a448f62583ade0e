"""The same results by the slowest obvious methods: loops over elements, and sorting of python lists."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy
import torch
from torch import Tensor, nn

from gmn_optim.gradients import DecomposedGradient
from gmn_optim.neurons import LayerPorts, LayerSpec, LayerWiring, NeuronSpace, NeuronSpaces
from gmn_optim.nn import DeepSets, InteractionsAcrossSets, LayerFeatures, ProductLayer, SetPooling


def pooled(rows: Sequence[Tensor], reduction: str) -> Tensor:
    """Return the mean or sum of a list of vectors."""
    total = torch.stack(list(rows)).sum(0)
    return total / len(rows) if reduction == "mean" else total


def interactions_across_sets(layer: InteractionsAcrossSets, x: Tensor) -> Tensor:
    """Return ``M1 x_ij + M2 pool_i' x_i'j + M3 pool_j' x_ij' + M4 pool_i'j' x_i'j' + bias``, element by element."""
    points, neurons, how = range(x.shape[0]), range(x.shape[1]), layer.reduction
    rows = []
    for i in points:
        for j in neurons:
            out = layer.own.weight @ x[i, j] + layer.own.bias
            out = out + layer.over_points.weight @ pooled([x[k, j] for k in points], how)
            out = out + layer.over_neurons.weight @ pooled([x[i, k] for k in neurons], how)
            out = out + layer.over_all.weight @ pooled([x[k, m] for k in points for m in neurons], how)
            rows.append(out)
    return torch.stack(rows).view(len(points), len(neurons), -1)


def deep_sets(layer: DeepSets, x: Tensor) -> Tensor:
    """Return ``M1 x_j + M2 pool_j' x_j' + bias``, neuron by neuron."""
    total = layer.over_neurons.weight @ pooled(list(x), layer.reduction)
    return torch.stack([layer.own.weight @ row + layer.own.bias + total for row in x])


def set_pooling(layer: SetPooling, x: Tensor) -> Tensor:
    """Return ``M1 pool_i x_ij + M2 pool_ij' x_ij' + bias``, neuron by neuron."""
    points, neurons, how = range(x.shape[0]), range(x.shape[1]), layer.reduction
    inner = layer.deep_sets
    total = inner.over_neurons.weight @ pooled([x[i, j] for i in points for j in neurons], how)
    if how == "mean":
        per_neuron = [pooled([x[i, j] for i in points], how) for j in neurons]
    else:
        per_neuron = [sum((x[i, j] for i in points), torch.zeros_like(x[0, 0])) for j in neurons]
    return torch.stack([inner.own.weight @ row + inner.own.bias + total for row in per_neuron])


def seen_inputs(ports: LayerPorts, spaces: NeuronSpaces, output: int) -> range:
    """Return which of a layer's input neurons an output neuron sees: those of its own of the layer's groups."""
    inputs, outputs = spaces.widths[ports.input_space], spaces.widths[ports.output_space]
    for group in range(ports.groups):
        if output < (group + 1) * outputs // ports.groups:
            return range(group * inputs // ports.groups, (group + 1) * inputs // ports.groups)
    raise IndexError(output)


def mlp(first: Sequence[nn.Linear], last: nn.Linear, features: Sequence[Tensor]) -> Tensor:
    """Return an MLP of concatenated features, the parts of its first layer put together."""
    weight, bias = torch.cat([part.weight for part in first], dim=1), first[0].bias
    return last.weight @ (weight @ torch.cat(list(features)) + bias).relu() + last.bias


def product_layer(
    layer: ProductLayer, h: Tensor, spaces: NeuronSpaces, parameters: Sequence[LayerFeatures] | None = None
) -> list[LayerFeatures]:
    """Return both MLPs' outputs, with the concatenations built and the halves of their first layers put together."""
    of_pair, of_neuron = [layer.from_output, layer.from_input], [layer.from_neuron]
    if parameters is not None:
        of_pair, of_neuron = [*of_pair, layer.from_weight], [*of_neuron, layer.from_bias]
    outputs = []
    for index, ports in enumerate(spaces.layers):
        outs, ins = h[spaces.place(ports.output_space)], h[spaces.place(ports.input_space)]
        own = parameters[index] if parameters is not None else None
        weight, bias = [], []
        for i, hi in enumerate(outs):
            row = []
            for column, j in enumerate(seen_inputs(ports, spaces, i)):
                features = [hi, ins[j]] + ([own.weight[i, column]] if own else [])
                row.append(mlp(of_pair, layer.to_weight, features))
            weight.append(torch.stack(row))
            bias.append(mlp(of_neuron, layer.to_bias, [hi] + ([own.bias[i]] if own else [])))
        outputs.append(LayerFeatures(torch.stack(weight), torch.stack(bias)))
    return outputs


def product_of_roles(
    layer: ProductLayer, h: Tensor, spaces: NeuronSpaces, layers: Mapping[str, Sequence[str]]
) -> Tensor:
    """Return the features of weights, tables, scales and biases behind one another (size, c), element by element."""
    rows = []
    for role in ("weight", "table", "scale", "bias"):
        for ports in (spaces.layer(name) for name in layers.get(role, ())):
            outs, ins = h[spaces.place(ports.output_space)], h[spaces.place(ports.input_space)]
            for _ in range(ports.rows if role == "table" else 1):
                for i, hi in enumerate(outs):
                    if role in ("weight", "table"):
                        pair = [layer.from_output, layer.from_input]
                        rows += [mlp(pair, layer.to_weight, [hi, ins[j]]) for j in seen_inputs(ports, spaces, i)]
                    elif role == "scale" and layer.from_scaled is not None:
                        rows.append(mlp([layer.from_scaled], layer.to_scale, [hi]))
                    else:
                        rows.append(mlp([layer.from_neuron], layer.to_bias, [hi]))
    return torch.stack(rows) if rows else h.new_zeros(0, layer.out_channels)


def per_sample_gradients(
    loss: Callable[[dict[str, Tensor], Tensor], Tensor], parameters: dict[str, Tensor], x: Tensor
) -> dict[str, Tensor]:
    """Return each data point's gradient (b, *parameter), by one backward pass for each batch of one."""
    gradients: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for k in range(x.shape[0]):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        found = torch.autograd.grad(loss(leaves, x[k : k + 1]), list(leaves.values()))
        for name, gradient in zip(leaves, found, strict=True):
            gradients[name].append(gradient)
    return {name: torch.stack(each) for name, each in gradients.items()}


def moving_average(values: Sequence[float], decay: float) -> float:
    """Return ``v <- decay v + (1 - decay) x`` after all values, from zero."""
    average = 0.0
    for value in values:
        average = decay * average + (1.0 - decay) * value
    return average


def adam_direction(
    gradients: Sequence[float], beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8
) -> float:
    """Return Adam's direction for one scalar parameter after all gradients."""
    steps = len(gradients)
    first = moving_average(gradients, beta1) / (1.0 - beta1**steps)
    second = moving_average([g * g for g in gradients], beta2) / (1.0 - beta2**steps)
    return first / (math.sqrt(second) + epsilon)


def root_mean_square(values: Sequence[float]) -> float:
    """Return the root mean square of a list."""
    return math.sqrt(sum(value * value for value in values) / len(values))


def quantile_rows(layers: Sequence[DecomposedGradient], rows: int) -> list[int]:
    """Return the rows at ``rows`` evenly spaced ranks of the summed squared backprops, by sorting a python list.

    Rows of equal backprops stand in the order of their summed squared activations.

    Args:
        layers: Gradients with equally many rows (data points times positions).
        rows: How many rows to choose.
    """
    flat = [gradient.backprops.flatten(0, 1).tolist() for gradient in layers]
    norms, ties = (
        [sum(value * value for layer in rows_of for value in layer[row]) for row in range(len(rows_of[0]))]
        for rows_of in (flat, [gradient.activations.flatten(0, 1).tolist() for gradient in layers])
    )
    ranked = sorted(range(len(norms)), key=lambda row: (norms[row], ties[row]))
    return [ranked[math.floor((k + 0.5) * len(norms) / rows)] for k in range(rows)]


Port = tuple[str, str]
"""Name of a layer, and ``input`` or ``output``, or ``scaled`` for a layer that scales each neuron by itself."""


def streams(
    specs: Mapping[str, LayerSpec], wiring: Mapping[str, LayerWiring]
) -> list[dict[Port, tuple[Hashable, ...]]]:
    """Return the names at each port of every stream, by merging sets of ports until none share a neuron.

    Streams without a reader or without a writer are left out.
    """
    merged: list[dict[Port, tuple[Hashable, ...]]] = []
    for layer, spec in specs.items():
        inputs = wiring[layer].inputs or tuple((layer, number) for number in range(spec.inputs))
        sides = {"input": inputs, "output": wiring[layer].outputs}
        if spec.structure == "diagonal":
            sides = {"scaled": wiring[layer].outputs}
        for side, names in sides.items():
            merged.append({(layer, side): names})
    for one in list(merged):
        touched = [each for each in merged if set(names_in(each)) & set(names_in(one))]
        while len(touched) > 1:
            joined = {port: names for each in touched for port, names in each.items()}
            merged = [each for each in merged if each not in touched] + [joined]
            touched = [each for each in merged if set(names_in(each)) & set(names_in(joined))]
    return [each for each in merged if {side for _, side in each} >= {"input", "output"}]


def names_in(stream: Mapping[Port, Sequence[Hashable]]) -> list[Hashable]:
    """Return all names in a stream."""
    return [name for names in stream.values() for name in names]


def is_pair(stream: Mapping[Port, Sequence[Hashable]]) -> bool:
    """Whether a stream is one reader and the writer of all of its neurons in the same order, each of them once."""
    plain = {port: tuple(names) for port, names in stream.items() if port[1] != "scaled"}
    (one, *others), layers = plain.values(), {layer for layer, _ in plain}
    return others == [one] and len(layers) == 2 and len(one) == len(set(one)) == len(set(names_in(stream)))


def neuron_sets(
    gradients: Mapping[str, DecomposedGradient], spaces: NeuronSpaces, rows: int
) -> tuple[list[list[list[float]]], list[list[float]]]:
    """Return factors (r, n, 2) and moments (n, 4) of all neurons as lists; streams lend what a port lacks."""
    flat = {ports.name: as_rows(gradients[ports.name], ports) for ports in spaces.layers}
    counts = {name: len(a) for name, (a, _) in flat.items()}
    chosen = {
        name: quantile_rows([gradients_of(*flat[other]) for other in flat if counts[other] == counts[name]], rows)
        for name in flat
    }
    owned: list[
        list[list[float] | None]
    ] = []  # for each neuron its a's and its g's: the chosen rows, mean, mean square
    for space in spaces.spaces:
        for neuron in range(space.width):
            halves: list[list[float] | None] = []
            for half, layer in enumerate((space.reader, space.writer)):
                values = None if layer is None else [row[neuron] for row in flat[layer][half]]
                halves.append(None if values is None else measured(values, chosen[layer]))
            owned.append(halves)
    places = [(space, k) for space in spaces.spaces for k in range(space.width)]
    filled = []
    for (space, neuron), halves in zip(places, owned, strict=True):
        filled.append([lent(space, neuron, half, places, owned, rows) for half in (0, 1)] if None in halves else halves)
    factors = [[[halves[0][row], halves[1][row]] for halves in filled] for row in range(rows)]
    return factors, [[*halves[0][rows:], *halves[1][rows:]] for halves in filled]


def as_rows(gradient: DecomposedGradient, ports: LayerPorts) -> tuple[list[list[float]], list[list[float]]]:
    """Return rows of activations and of backprops; the neuron that stands for the rows of a table is always 1."""
    a, g = (factor.flatten(0, 1).tolist() for factor in gradient)
    return ([[1.0]] * len(g) if ports.structure == "table" else a), g


def gradients_of(a: list[list[float]], g: list[list[float]]) -> DecomposedGradient:
    """Return rows as factors."""
    return DecomposedGradient(*(torch.tensor(rows, dtype=torch.float64).unsqueeze(1) for rows in (a, g)))


def measured(values: list[float], chosen: Sequence[int]) -> list[float]:
    """Return the chosen values, and the mean of all and of their squares."""
    return [
        *(values[row] for row in chosen),
        sum(values) / len(values),
        sum(value * value for value in values) / len(values),
    ]


def lent(
    space: NeuronSpace,
    neuron: int,
    half: int,
    places: Sequence[tuple[NeuronSpace, int]],
    owned: Sequence[Sequence[list[float] | None]],
    rows: int,
) -> list[float]:
    """Return a neuron's own factor, or the mean over all that are the same member of its stream, or zeros."""

    def member(place: tuple[NeuronSpace, int]) -> int:
        return place[1] if place[0].members is None else place[0].members[place[1]]

    own = owned[places.index((space, neuron))][half]
    if own is not None:
        return own
    same = [
        halves[half]
        for place, halves in zip(places, owned, strict=True)
        if space.stream is not None and place[0].stream == space.stream and member(place) == member((space, neuron))
    ]
    lenders = [factor for factor in same if factor is not None]
    return [sum(column) / len(lenders) for column in zip(*lenders, strict=True)] if lenders else [0.0] * (rows + 2)


def mean_outer_product(vectors: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """Return the mean over vectors (n) of their outer products with themselves, divided by its mean diagonal."""
    total = numpy.zeros((len(vectors[0]), len(vectors[0])))
    for vector in vectors:
        total += numpy.outer(vector, vector) / len(vectors)
    return total / numpy.mean(numpy.diag(total))


class ScheduleFree(torch.optim.Optimizer):
    """Steps of RMSprop with averaged iterates, all three sequences written out: z steps, x averages, y is trained."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, beta: float) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self) -> None:
        """Take a step."""
        for group in self.param_groups:
            for y in group["params"]:
                state = self.state[y]
                if not state:
                    state.update(number=0, z=y.clone(), x=y.clone(), v=torch.zeros_like(y))
                state["number"] += 1
                state["v"] = 0.995 * state["v"] + 0.005 * y.grad**2
                root = (state["v"] / (1 - 0.995 ** state["number"])).sqrt()
                state["z"] = state["z"] - group["lr"] * y.grad / (root + 1e-16)
                share = 10 / (state["number"] + 9)
                state["x"] = (1 - share) * state["x"] + share * state["z"]
                y.copy_((1 - group["beta"]) * state["z"] + group["beta"] * state["x"])


def average_of_path(path: Sequence[Tensor], beta: float, sharpness: float) -> Tensor:
    """Return the average x of the points z that a path ``y = (1 - beta) z + beta x`` was made of, by solving for z."""
    x = path[0]
    for number, y in enumerate(path[1:], start=1):
        share = max(sharpness / (number + sharpness - 1), 0.005)
        # y = (1 - beta) z + beta ((1 - share) x + share z)
        z = (y - beta * (1 - share) * x) / (1 - beta + beta * share)
        x = (1 - share) * x + share * z
    return x


class KroneckerAdam:
    """Adam in an eigenbasis, one matrix (o, i) at a time, by loops over vectors and elements.

    Args:
        shape: Of the matrix.
        sides: Whether its rows and its columns have a basis.
        due: Numbers of the steps at which the bases are made anew.
    """

    def __init__(self, shape: tuple[int, int], sides: tuple[bool, bool], due: Sequence[int]) -> None:
        self.sides, self.due, self.step = sides, due, 0
        self.bases = [numpy.eye(n) for n in shape]
        self.moments = [numpy.zeros((n, n)) for n in shape]
        self.first, self.second = numpy.zeros(shape), numpy.zeros(shape)

    def direction(
        self,
        gradient: numpy.ndarray,
        factors: tuple[list[numpy.ndarray], list[numpy.ndarray]] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        decay: float = 0.95,
        damping: float = 1e-4,
    ) -> numpy.ndarray:
        """Return the direction after one more gradient (o, i), given vectors on both sides, or with its own."""
        self.step += 1
        rows, columns = factors or (list(gradient.T), list(gradient))
        before = list(self.moments)
        self._follow(rows, columns, decay)
        followed = self.moments
        if factors is None:  # of its own Gram matrices the newest has but a small share in the basis
            self.moments = before
            self._follow(rows, columns, 0.999)
        if self.step in self.due and (self.step > 1 or factors is not None):
            self._turn()
        self.moments = followed
        turned = self.bases[0].T @ gradient @ self.bases[1]
        self.first = betas[0] * self.first + (1 - betas[0]) * gradient
        first = self.bases[0].T @ self.first @ self.bases[1] / (1 - betas[0] ** self.step)
        return self._bounded(self.bases[0] @ self._divided(first, turned, betas[1], damping) @ self.bases[1].T)

    def _bounded(self, direction: numpy.ndarray) -> numpy.ndarray:
        """Return a direction, here as it is."""
        return direction

    def _divided(self, first: numpy.ndarray, turned: numpy.ndarray, beta2: float, damping: float) -> numpy.ndarray:
        """Return the averaged gradient over the root of the second moment, in the bases."""
        self.second = beta2 * self.second + (1 - beta2) * turned**2
        second = self.second / (1 - beta2**self.step)
        return first / (numpy.sqrt(second) + 1e-8 + damping * math.sqrt(second.mean()))

    def _follow(self, rows: list[numpy.ndarray], columns: list[numpy.ndarray], decay: float) -> None:
        """Average the second moments of both sides."""
        self.moments = [
            decay * moment + (1 - decay) * mean_outer_product(vectors)
            for moment, vectors in zip(self.moments, (rows, columns), strict=True)
        ]

    def _turn(self) -> None:
        """Take the eigenvectors as bases; the second moment of a new direction is a mean over the old ones."""
        old = self.bases
        self.bases = [
            numpy.linalg.eigh(moment)[1] if turns else basis
            for moment, turns, basis in zip(self.moments, self.sides, old, strict=True)
        ]
        second = numpy.zeros_like(self.second)
        for (a, b), _ in numpy.ndenumerate(second):
            for (c, d), value in numpy.ndenumerate(self.second):
                cosines = (self.bases[0][:, a] @ old[0][:, c]) * (self.bases[1][:, b] @ old[1][:, d])
                second[a, b] += cosines**2 * value
        self.second = second


class KroneckerScheduleFree(KroneckerAdam):
    """Schedule-free steps in an eigenbasis: the points y, z and x of one matrix (o, i), all written out.

    Args:
        start: The matrix before the first step, the column of the bias among it.
        sides: Whether its rows and its columns have a basis.
        due: Numbers of the steps at which the bases are made anew.
        scale: What its steps are multiplied by.
        sharpness: Of the average.
        looks: Number of a step at which second moments are followed to how many steps that stands for; None for every
            step.
        factored: Whether roots of second moments are taken for products of row and column, as those of a weight are.
        largest: Bound of elements, 0 for none.
    """

    def __init__(
        self,
        start: numpy.ndarray,
        sides: tuple[bool, bool],
        due: Sequence[int],
        scale: float,
        sharpness: float = 10.0,
        looks: Mapping[int, int] | None = None,
        factored: bool = True,
        largest: float = 0.0,
    ) -> None:
        super().__init__(start.shape, sides, due)
        self.largest = largest
        self.looks, self.factored, self.roots = looks, factored, numpy.zeros(start.shape)
        self.x, self.y, self.z, self.scale, self.sharpness = start, start, start, scale, sharpness

    def move(
        self,
        gradient: numpy.ndarray,
        factors: tuple[list[numpy.ndarray], list[numpy.ndarray]] | None,
        alpha: float,
        beta: float = 0.8,
        decay: float = 0.95,
    ) -> numpy.ndarray:
        """Return y after one more gradient (o, i), given vectors on both sides."""
        normalized = self.direction(gradient, factors, betas=(0.0, 0.995), decay=decay)
        self.z = self.z - alpha * self.scale * normalized
        share = self.sharpness / (self.step + self.sharpness - 1)
        self.x = (1 - share) * self.x + share * self.z
        self.y = (1 - beta) * self.z + beta * self.x
        return self.y

    def _divided(self, first: numpy.ndarray, turned: numpy.ndarray, beta2: float, damping: float) -> numpy.ndarray:
        """Return the gradient over products of row and column."""
        if not self.factored:
            return super()._divided(first, turned, beta2, damping)
        steps = 1 if self.looks is None else self.looks.get(self.step, 0)
        if steps:
            self.second = beta2**steps * self.second + (1 - beta2**steps) * turned**2
            self.roots = numpy.sqrt(self.second / (1 - beta2**self.step))
        mean, divided = self.roots.mean(), numpy.zeros_like(turned)
        for (i, j), value in numpy.ndenumerate(turned):
            row, column = self.roots[i].mean() / mean, self.roots[:, j].mean() / mean
            divided[i, j] = value / ((mean * (row + math.sqrt(damping)) + 1e-16) * (column + math.sqrt(damping)))
        return divided

    def _bounded(self, direction: numpy.ndarray) -> numpy.ndarray:
        """Return a direction with bounded elements, and no larger than 1.5 (root mean square)."""
        if not self.factored:
            return direction
        for (i, j), value in numpy.ndenumerate(direction.copy() if self.largest else direction[:0]):
            direction[i, j] = max(-self.largest, min(self.largest, value))
        return direction * min(1.0, 1.5 / root_mean_square(direction.flatten().tolist()))


def most_are_small(weights: Sequence[numpy.ndarray]) -> bool:
    """Return whether more than half of the weights (o, i) that are not as good as zero are small, but not all."""
    sizes = [root_mean_square(weight.flatten().tolist()) * math.sqrt(3 * weight.shape[1]) for weight in weights]
    telling = [size for size in sizes if size >= 0.02]
    small = sum(1 for size in telling if size < 0.18)
    return 2 * small > len(telling) > small


def schedule_free_scale(weight: numpy.ndarray, inputs: int, matrices: int) -> float:
    """Return what the steps of a matrix are multiplied by: factors of its width, the model's depth, and its size."""
    size = root_mean_square(weight.flatten().tolist()) * math.sqrt(3 * inputs)
    size = 1.0 if size < 0.02 else min(max(size, 0.1), 2.0)
    return size * math.sqrt(64 / max(inputs, 16)) * math.sqrt(2 / matrices)


def turned_noise(gradients: Sequence[Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    """Return the sum of the squares of gradients (o, i), each turned by itself, coordinate by coordinate."""
    noise = torch.zeros_like(gradients[0])
    for gradient in gradients:
        for o in range(noise.shape[0]):
            for i in range(noise.shape[1]):
                noise[o, i] += (rows[:, o] @ gradient @ columns[:, i]) ** 2
    return noise


def coordinate_features(gradient: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """Return the six features of each coordinate (o, i, 6), by loops over elements."""
    outs, ins = signal.shape
    s, q, g = signal.tolist(), noise.tolist(), gradient.tolist()

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    of_all, of_noise = mean([v for row in s for v in row]), mean([v for row in q for v in row])
    rows = []
    for o in range(outs):
        for i in range(ins):
            logs = (
                0.5 * math.log(s[o][i] / q[o][i]),
                0.25 * math.log(s[o][i] / of_all),
                0.25 * math.log(q[o][i] / of_noise),
                0.25 * math.log(mean(s[o]) / of_all),
                0.25 * math.log(mean([s[k][i] for k in range(outs)]) / of_all),
            )
            rows.append([*logs, g[o][i] ** 2 / (g[o][i] ** 2 + s[o][i])])
    return torch.tensor(rows, dtype=torch.float64).view(outs, ins, 6)


def layer_features(
    signal: Tensor, noise: Tensor, gradient: Tensor, average: Tensor, parameters: Tensor, matrices: int
) -> list[float]:
    """Return the six features of a matrix (o, i), from sums over its elements."""
    outs, ins = signal.shape
    s, q, g, m, p = (each.flatten().tolist() for each in (signal, noise, gradient, average, parameters))
    product = sum(a * b for a, b in zip(g, m, strict=True))
    lengths = math.sqrt(sum(a * a for a in g)) * math.sqrt(sum(b * b for b in m))
    return [
        0.5 * math.log(ins / 64),
        0.5 * math.log(outs / 32),
        0.5 * math.log(matrices / 2),
        0.5 * math.log(sum(s) / sum(q)),
        3 * product / lengths,
        0.5 * math.log(ins * sum(w * w for w in p) / len(p)),
    ]


def eigen_neuron_features(side: Tensor, chosen: Sequence[int]) -> tuple[list[list[list[float]]], list[list[float]]]:
    """Return the features of a side (R, n) over the chosen rows (r, n, 2), and of its neurons (n, 2), as lists."""
    rows, count, neurons = side.tolist(), len(side), range(side.shape[1])
    variance = [sum(row[k] ** 2 for row in rows) / count for k in neurons]
    scale = math.sqrt(sum(variance) / len(variance))
    sizes = [[abs(rows[r][k]) / scale for k in neurons] for r in chosen]
    sets = [[[size, math.log(1 + size**2)] for size in row] for row in sizes]
    mean = [abs(sum(row[k] for row in rows) / count) for k in neurons]
    shares = [0.25 * math.log(max(variance[k] / scale**2, 1e-7)) for k in neurons]
    return sets, [[shares[k], 2 * mean[k] / math.sqrt(variance[k])] for k in neurons]


SeenByController = tuple[int, Tensor, Tensor, Sequence[tuple[Tensor, Tensor]] | None]


def controller_memory(seen: Sequence[SeenByController]) -> list[float]:
    """Return what a controller remembers of a matrix besides its pace: cosine, log of signal against noise, minus the
    log of the share of rows that gradients are made of, and how often a row of the first look stands in another.

    Args:
        seen: Of each step its age, the gradient, the average of earlier steps and, at a look, each row's factors.
    """
    cosine, ratio, concentration, repetition, first = 0.0, 0.0, 0.0, 0.0, None
    for age, gradient, average, rows in seen:
        product = sum(g * a for g, a in zip(gradient.flatten().tolist(), average.flatten().tolist(), strict=True))
        weight = max(0.2, 1 / max(age - 1, 1))
        cosine += weight * (product / (gradient.norm().item() * average.norm().item()) - cosine)
        if rows is not None:
            noise = sum(torch.outer(g, a).square().sum().item() for g, a in rows)
            weight = 1.0 if age <= 1 else max(0.1, 1 / age)
            ratio += weight * (math.log(gradient.square().sum().item() / noise) - ratio)
            norms = [torch.outer(g, a).norm().item() for g, a in rows]
            share = sum(norms) ** 2 / len(norms) / sum(norm**2 for norm in norms)
            weight = 1.0 if age <= 1 else max(0.2, 1 / age)
            concentration += weight * (-math.log(share) - concentration)
            inputs = [a.tolist() for _, a in rows]
            if first is None:
                first = [a for a in inputs if inputs.count(a) == 1]
            elif first:
                times = sum(inputs.count(a) for a in first) / len(first) * all(_is_of_softmax(g) for g, _ in rows)
                repetition += max(0.05, 1 / max(age - 1, 1)) * (times - repetition)
    return [cosine, ratio, concentration, repetition]


def _is_of_softmax(backprop: Tensor) -> bool:
    """Return whether a backprop is of the cross-entropy of a softmax: probabilities, but for that of the label."""
    below = [value for value in backprop.tolist() if value < 0]
    return len(below) == 1 and abs(backprop.sum().item()) < 1e-6 * abs(below[0])


def turned_squares(old: Tensor, new: Tensor, squares: Tensor) -> list[list[float]]:
    """Return second moments along new directions (n, k) of rows whose old coordinates (n, n) are uncorrelated."""
    return [
        [
            sum((old[:, place] @ direction).item() ** 2 * square for place, square in enumerate(row.tolist()))
            for direction in new.mT
        ]
        for row in squares
    ]
