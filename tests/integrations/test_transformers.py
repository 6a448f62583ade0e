"""Hugging Face's ``Trainer(optimizers=(optimizer, schedule))`` on a tiny GPT-2 and a tiny BERT."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gmn_optim import CaptureWarning, GMNOptimizer
from tests.cases import assert_equal_states, assert_same, snapshot
from tests.integrations.checks import assert_served, assert_unserved, default_config

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("fresh_accelerate", "clean_folder")

VOCABULARY, LENGTH = 24, 10
Rows = list[dict[str, Any]]


def make_gpt2(**options: Any) -> nn.Module:
    """Return the same tiny GPT-2 at every call."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, n_positions=12, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    config = transformers.GPT2Config(**sizes, loss_type="ForCausalLM", **options)
    return transformers.GPT2LMHeadModel(config)


def make_bert(dropout: float = 0.1) -> nn.Module:
    """Return the same tiny BERT at every call."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.BertForSequenceClassification(config)


def sequences() -> Rows:
    """Return 48 sequences that go up in equal steps, and are to be continued."""
    generator, rows = torch.Generator().manual_seed(0), []
    for _ in range(48):
        step, start = (
            torch.randint(1, 4, (1,), generator=generator),
            torch.randint(0, VOCABULARY, (1,), generator=generator),
        )
        tokens = (torch.arange(LENGTH) * step + start) % VOCABULARY
        rows.append({"input_ids": tokens, "labels": tokens})
    return rows


def classified() -> Rows:
    """Return 48 sequences of various lengths, whose class is told by the first token."""
    generator, rows = torch.Generator().manual_seed(0), []
    for number in range(48):
        tokens = torch.randint(0, VOCABULARY, (4 + number % 7,), generator=generator)
        rows.append({"input_ids": tokens, "labels": int(tokens[0] >= VOCABULARY // 2)})
    return rows


def collate(rows: Rows) -> dict[str, Tensor]:
    """Return one batch, padded."""
    batch = {"labels": torch.stack([torch.as_tensor(row["labels"]) for row in rows])}
    tokens = [row["input_ids"] for row in rows]
    masks = [torch.ones_like(each) for each in tokens]
    for name, values in (("input_ids", tokens), ("attention_mask", masks)):
        batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True)
    return batch


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., tuple[GMNOptimizer, list[float]]]:
    """Return a function that trains a model by a ``Trainer``, and returns the optimizer and the losses of its log."""

    def run(
        model: nn.Module, rows: Rows, evaluated: Rows | None = None, resume: str | None = None, **options: Any
    ) -> tuple[GMNOptimizer, list[float]]:
        quiet = dict(report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", logging_steps=1)
        sizes = dict(per_device_train_batch_size=8, num_train_epochs=4, train_sampling_strategy="sequential")
        arguments = transformers.TrainingArguments(tmp_path / "out", **{**quiet, **sizes, **options})
        optimizer = GMNOptimizer(model)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, 2, 48)
        trainer = transformers.Trainer(model, arguments, collate, rows, evaluated, optimizers=(optimizer, schedule))
        trainer.train(resume_from_checkpoint=resume)
        return optimizer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return run


def train_plainly(model: nn.Module, rows: Rows, accumulated: int = 1, norm: float = 1.0) -> None:
    """Train four rounds without a ``Trainer``, clipping norms as it does by default."""
    model.train()
    optimizer = GMNOptimizer(model)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 2, 48)
    size = 8 * accumulated
    for start in list(range(0, len(rows), size)) * 4:
        for part in range(start, min(start + size, len(rows)), 8):
            (model(**collate(rows[part : part + 8])).loss / accumulated).backward()
        nn.utils.clip_grad_norm_(model.parameters(), norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def assert_about_same(model: nn.Module, other: nn.Module) -> None:
    """Require equal parameters up to rounding; the biases of keys move by nothing else, attention does not see them."""
    found, wanted = (
        {name: value for name, value in snapshot(each).items() if not name.endswith("key.bias")}
        for each in (model, other)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_bert_is_trained_with_factors(fit) -> None:
    optimizer, losses = fit(make_bert(), classified(), train_sampling_strategy="random", num_train_epochs=6)
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    assert_served(optimizer, 36)


def test_a_gpt2_is_trained_and_its_head_has_factors(fit) -> None:
    optimizer, losses = fit(make_gpt2(tie_word_embeddings=False), sequences())
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    assert_served(optimizer, 24)


@pytest.mark.filterwarnings("default::gmn_optim.errors.CaptureWarning")
def test_a_tied_head_is_warned_of_once_at_most(fit, recwarn) -> None:
    optimizer, losses = fit(make_gpt2(), sequences())
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    assert len(recwarn) <= 1
    assert all(each.category is CaptureWarning and "transformer.h" not in str(each.message) for each in recwarn)
    (row,) = [row for row in optimizer.summary().rows if row.parameter == "transformer.wte.weight"]
    if recwarn:
        assert row.updated_by == default_config().nominal and row.because in str(recwarn[0].message)
    assert optimizer.stats().steps == 24 and optimizer.stats().parameters[row.parameter].update_rms > 0


def test_the_trainer_equals_the_plain_loop(fit) -> None:
    model, twin = make_bert(dropout=0.0), make_bert(dropout=0.0)
    optimizer, _ = fit(model, classified(), max_grad_norm=0.1)
    train_plainly(twin, classified(), norm=0.1)
    assert_about_same(model, twin)
    assert_served(optimizer, 24)


def test_accumulated_batches_equal_the_plain_loop(fit) -> None:
    model, twin = make_bert(dropout=0.0), make_bert(dropout=0.0)
    # a bound that every norm exceeds: whether the Trainer divides the loss by the batches is for it to know
    optimizer, _ = fit(model, classified(), gradient_accumulation_steps=2, max_grad_norm=1e-2)
    train_plainly(twin, classified(), accumulated=2, norm=1e-2)
    assert_about_same(model, twin)
    assert_served(optimizer, 12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_activations_are_served(fit, use_reentrant) -> None:
    options = dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    optimizer, losses = fit(make_bert(), classified(), **options)
    assert losses[-1] < losses[0]
    assert_served(optimizer, 24)


def test_bfloat16_is_served(fit) -> None:
    optimizer, losses = fit(make_bert(), classified(), bf16=True, gradient_accumulation_steps=2)
    assert losses[-1] < losses[0]
    assert_served(optimizer, 12)


def test_a_compiled_model_is_named_once(fit) -> None:
    model = make_bert()
    with pytest.warns(CaptureWarning, match="torch.compile") as caught:
        optimizer, losses = fit(model, classified(), torch_compile=True, torch_compile_backend="eager")
    assert sum(each.category is CaptureWarning for each in caught) == 1
    assert losses[-1] < losses[0]
    assert_unserved(optimizer, ["classifier.weight", "bert.pooler.dense.bias"], "torch.compile")


RUNS = {"bert": (make_bert, classified), "gpt2": (lambda: make_gpt2(tie_word_embeddings=False), sequences)}


@pytest.mark.parametrize(("make_model", "make_rows"), RUNS.values(), ids=RUNS)
def test_a_run_resumes_bit_by_bit_from_its_checkpoint(fit, tmp_path, make_model, make_rows) -> None:
    whole, resumed, rows = make_model(), make_model(), make_rows()
    options = dict(save_strategy="steps", save_steps=12, train_sampling_strategy="random")
    complete, _ = fit(whole, rows, **options)
    for parameter in resumed.parameters():
        nn.init.zeros_(parameter)
    again, _ = fit(resumed, rows, resume=str(tmp_path / "out" / "checkpoint-12"), **options)
    assert_same(resumed, whole)
    assert_equal_states(again.state_dict(), complete.state_dict())
    assert_served(again, 12)


def test_the_best_model_is_put_back(fit, tmp_path) -> None:
    model, rows = make_bert(), classified()
    wrong = [{**row, "labels": 1 - row["labels"]} for row in rows]  # the better it learns, the worse it does here
    options = dict(save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True)
    optimizer, losses = fit(model, rows, evaluated=wrong, num_train_epochs=6, **options)
    state = json.loads((tmp_path / "out" / "checkpoint-36" / "trainer_state.json").read_text())
    best = state["best_model_checkpoint"]
    assert losses[-1] < losses[0] and not best.endswith("checkpoint-36")
    assert_same(model, load_file(Path(best) / "model.safetensors"))
    assert_served(optimizer, 36)


@pytest.mark.usefixtures("averaged_steps")
def test_the_trainer_evaluates_and_saves_averages_and_goes_on_from_where_it_was(fit, tmp_path) -> None:
    whole, resumed, plain, rows = *(make_bert(dropout=0.0) for _ in range(3)), classified()
    options = dict(save_strategy="steps", save_steps=12, eval_strategy="steps", eval_steps=12)
    optimizer, _ = fit(whole, rows, rows[:8], **options)
    fit(plain, rows)
    folder = tmp_path / "out" / "checkpoint-12"
    saved = load_file(folder / "model.safetensors")
    trained = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    number = [name for name, _ in whole.named_parameters()].index("classifier.weight")
    assert not torch.equal(saved["classifier.weight"], trained[number]["trained"])
    optimizer.train()
    assert_same(whole, plain)
    again, _ = fit(resumed, rows, rows[:8], resume=str(folder), **options)
    again.train()
    assert_same(resumed, plain)
