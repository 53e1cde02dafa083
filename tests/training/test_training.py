"""Training from nothing: the loss falls, an interrupted run resumes to the same weights, a bad recipe is refused."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, Qwen2ForCausalLM, TrainerCallback

from mvkernels import BranchLayout, TagTokens
from mvkernels.grammar import TAGS
from mvkernels.model.checkpoint.add_tags import read_entry
from mvkernels.model.tasks import arithmetic, sat
from mvkernels.model.tasks.arithmetic import generate
from mvkernels.model.training import Recipe, TrainingRun, train
from mvkernels.model.training.data import PackedProblems
from mvkernels.model.training.optimizer import MuonAdamW, orthogonal
from mvkernels.model.training.scratch import TRAINING_FILE, make_tokenizer

TINY = Recipe(
    steps=12,
    tokens_per_step=1500,
    warmup_steps=2,
    hidden_size=32,
    layers=2,
    intermediate_size=64,
    log_every=2,
    save_every=4,
)


class Interrupt(TrainerCallback):
    """What Ctrl-C does, at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    return train(TINY, tmp_path_factory.mktemp("whole") / "run", progress=False)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(arithmetic.TASK)


def test_the_loss_falls(whole: TrainingRun) -> None:
    assert [step for step, _ in whole.losses] == [2, 4, 6, 8, 10, 12]
    assert whole.losses[-1][1] < whole.losses[0][1] - 0.5


def test_an_interrupted_run_resumes_to_the_same_losses_and_weights(whole: TrainingRun, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path / "run", progress=False, callbacks=[Interrupt(7)])
    resumed = train(TINY, tmp_path / "run", resume=True, progress=False)
    assert resumed.losses == whole.losses
    weights, expected = (load_file(run.folder / "model.safetensors") for run in (resumed, whole))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_what_is_saved_loads_and_names_its_tags(whole: TrainingRun) -> None:
    model = Qwen2ForCausalLM.from_pretrained(whole.folder)
    tokenizer = AutoTokenizer.from_pretrained(whole.folder)
    assert model.num_parameters() == whole.parameters
    assert read_entry(model.config) == "canonical"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.use_cache
    assert TagTokens.from_tokenizer(tokenizer).ids == TagTokens.from_tokenizer(make_tokenizer(arithmetic.TASK)).ids
    # transformers gives a Qwen2 checkpoint Qwen2's own tokenizer class, which must cut the text into the same tokens.
    for problem in islice(generate(0), 20):
        text = problem.prompt() + problem.parallel_trace
        assert tokenizer.encode(text) == make_tokenizer(arithmetic.TASK).encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # No checkpoint is left beside the model.
    assert not [path for path in whole.folder.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    "text",
    [
        "Compute 47*38 + 125*6.\n<Think>\n<Parallel>\n",
        "  two  spaces,\ttabs\r\n\n\nnewlines \n",
        "héllo wörld, 日本語 😀, don't -> 12 = a+b , x",
    ],
    ids=["task", "whitespace", "unicode"],
)
def test_any_text_comes_back_from_the_tokenizer(text: str, tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_and_tags_are_single_tokens(tokenizer) -> None:
    assert [tokenizer.decode([i]) for i in tokenizer.encode("3*128=3\n")] == list("3*128=3\n")
    assert all(len(tokenizer.encode(tag)) == 1 for tag in TAGS)


def test_the_chat_template_asks_for_parallel_thinking(tokenizer) -> None:
    problem = next(generate(0))
    chat = [{"role": "user", "content": problem.question}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == problem.prompt()


def test_a_row_is_packed_documents_with_their_own_layouts(tokenizer) -> None:
    data = PackedProblems(TINY, tokenizer)
    row = data[3]
    layout: BranchLayout = row["branch_layout"]
    ids, labels = row["input_ids"][0], row["labels"][0]
    # The last document is cut where the row is full.
    assert len(ids) == layout.total_tokens == TINY.tokens_per_step
    starts, ends = layout.cu_seqlens[:-1].long(), layout.cu_seqlens[1:-1].long()
    assert len(starts) > 1
    # Every document is scored on its end of text, and on nothing of its question.
    assert torch.equal(ends - 1, (ids == tokenizer.eos_token_id).nonzero().flatten())
    assert (labels[ends - 1] == tokenizer.eos_token_id).all()
    assert (labels[starts] == -100).all()
    assert (layout.position_ids[starts] == 0).all()
    assert torch.equal(ids, data[3]["input_ids"][0])
    assert not torch.equal(ids, data[4]["input_ids"][0])


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)], ids=["square", "wide", "tall"])
def test_orthogonal_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    sizes = torch.tensor([1, 1e-3, 50])[:, None, None]
    matrices = sizes * torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for matrix, result in zip(matrices, orthogonal(matrices), strict=True):
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        # The same singular vectors, and values that the quintic iteration leaves between 0.3 and 1.3.
        values = left.T @ result @ right.T
        assert (values - torch.diag(values.diagonal())).abs().max() < 0.05
        assert values.diagonal().min() > 0.3
        assert values.diagonal().max() < 1.3


def test_the_optimizer_treats_each_matrix_by_itself() -> None:
    """However many are of its shape, and also where one has no gradient."""

    def step(*present: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(4, 6, bias=False) for _ in range(3)), nn.Linear(6, 6, bias=False))
        optimizer = MuonAdamW(model, 1e-2, 0.1, 1e-3)
        for _ in range(2):
            for place in present:
                model[place].weight.grad = torch.randn(
                    model[place].weight.shape, generator=torch.Generator().manual_seed(place)
                )
            optimizer.step()
        return [layer.weight.detach() for layer in model]

    together = step(0, 1, 2, 3)
    assert len({tuple(weight.flatten().tolist()) for weight in together}) == 4
    for present in ((0,), (1,), (0, 2), (3,)):
        found, untouched = step(*present), step()
        for place in range(4):
            expected = together[place] if place in present else untouched[place]
            assert torch.allclose(found[place], expected, atol=1e-4)
            assert place not in present or not torch.allclose(found[place], untouched[place], atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "chess"}, r"task: expected one of \('arithmetic', 'sat'\), got 'chess'"),
        ({"steps": 0}, r"steps: expected a whole number >= 1, got 0"),
        ({"learning_rate": float("nan")}, r"learning_rate: expected a finite number > 0, got nan"),
        ({"rope_theta": 0.0}, r"rope_theta: expected a finite number > 0, got 0.0"),
        ({"sequential_share": 1.5}, r"sequential_share: expected a number in \[0, 1\], got 1.5"),
        ({"hidden_size": 100}, r"hidden_size: expected a multiple of 32, got 100"),
        ({"warmup_steps": 9999}, r"warmup_steps: expected 0 to 3600 \(the steps\), got 9999"),
        ({"save_every": 30}, r"save_every: expected a multiple of log_every, 20, got 30"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_recipe_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


def test_the_bar_shows_the_loss_and_is_closed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last logged one, of a resumed run from the first moment on; an interrupted bar ends its line."""
    recipe = Recipe(**{**vars(TINY), "tokens_per_step": 100, "steps": 5, "log_every": 2})
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", callbacks=[Interrupt(5)])
    shown = capsys.readouterr().err
    assert shown.endswith("\n") and "4/5" in shown and ", loss " in shown
    losses = [f"loss {loss:.4f}" for _, loss in train(recipe, tmp_path / "run", resume=True).losses]
    shown = capsys.readouterr().err
    assert len(losses) == 3 and losses[1] in shown and losses[0] not in shown.splitlines()[-1]
    assert losses[2] in shown.rstrip().splitlines()[-1].rpartition("\r")[2] and "5/5" in shown


def test_resuming_needs_the_same_recipe_and_a_checkpoint(whole: TrainingRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resume: expected a folder with the checkpoint of an interrupted run"):
        train(TINY, tmp_path / "none", resume=True)
    with pytest.raises(ValueError, match=r"output: expected a new or empty folder, or one to resume"):
        train(TINY, whole.folder)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path / "run", progress=False, callbacks=[Interrupt(5)])
    with pytest.raises(ValueError, match=r"resume: expected seed=0 as in .*recipe.json, got 1"):
        train(Recipe(**{**vars(TINY), "seed": 1}), tmp_path / "run", resume=True)


def test_a_model_of_another_task_learns_its_problems(tmp_path: Path) -> None:
    recipe = Recipe(**{**vars(TINY), "task": "sat", "sequential_share": 1.0, "steps": 6})
    run = train(recipe, tmp_path / "run", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    # The indices are single tokens after loading too, whatever class transformers chooses for the tokenizer.
    assert len(tokenizer.encode("2.1.2.2")) == 1 and tokenizer.decode(tokenizer.encode("2.1+c")) == "2.1+c"
    row = PackedProblems(recipe, make_tokenizer(sat.TASK))[0]
    assert tokenizer.decode(row["input_ids"][0][:4]).startswith("Can all")
    assert row["branch_layout"].critical_path == row["branch_layout"].total_tokens  # chains alone
    known = json.loads((run.folder / TRAINING_FILE).read_text())
    assert [tuple(loss) for loss in known["losses"]] == [*run.losses] and known["seconds"] == run.seconds > 0
    assert len(known["clock"]) == len(run.losses) == 3
