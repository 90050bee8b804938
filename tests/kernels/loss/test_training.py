"""The loss inside a model that is compiled, checkpointed, and trained: all implementations follow the same course."""

import copy
import functools

import pytest
import torch
from helpers.loss_problems import DEVICE, problem
from helpers.marks import ON_DEVICE

from ki_ds.corpus.tokenizer import expected
from ki_ds.models import architectures, hugging_face, language_model
from ki_ds.models.language_model import LanguageModel

VOCABULARY, LENGTH, ROWS = 60, 10, 14
# the interpreter computes in numpy, which warns of what stays behind a mask
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:.*deprecated:FutureWarning")


def student(tied=True):
    sizes = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "tie_word_embeddings": tied}
    config = architectures.configuration(sizes, "clm", expected(VOCABULARY, "clm"), LENGTH, "m")
    architectures.set_dropout(config, 0.0)
    return LanguageModel(hugging_face.new_model(config, "clm", seed=1), VOCABULARY).to(DEVICE)


def batch(seed):
    """Input ids and rows, and what the loss is told of the rows; their number changes from batch to batch."""
    given = problem(ROWS - seed % 3, 1, VOCABULARY, 6, seed, "tail", torch.float32, device=DEVICE)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (3, LENGTH), generator=g)
    rows = torch.randperm(3 * LENGTH, generator=g)[: len(given["labels_N"])]
    return ids.to(DEVICE), rows.to(DEVICE), given["labels_N"], given["targets"], given["alpha_N"], 2.0


def loss_and_gradients(model, seed=0):
    model.zero_grad()
    loss = model(*batch(seed)).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def run(monkeypatch):
    """Runs the models' loss by a named implementation."""
    original = language_model.ki_loss
    return lambda impl: monkeypatch.setattr(language_model, "ki_loss", functools.partial(original, impl=impl))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints_change_nothing(reentrant):
    plain = student()
    saved = copy.deepcopy(plain)
    saved.backbone.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saved.train()
    assert saved.backbone.is_gradient_checkpointing
    torch.testing.assert_close(loss_and_gradients(saved), loss_and_gradients(plain.train()), rtol=0, atol=0)


@pytest.mark.slow
def test_compiling_the_backbone_changes_nothing():
    plain = student()
    compiled = copy.deepcopy(plain)
    compiled.backbone.compile(backend="aot_eager")
    for seed in (0, 1):  # another number of rows
        found, wanted = (loss_and_gradients(model, seed) for model in (compiled, plain))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def curve(model, steps):
    """Losses of some steps of AdamW, whose first ones divide gradients by their own size and so pass on differences."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-6)
    losses = []
    for step in range(steps):
        loss = model(*batch(step % 5)).loss / ROWS
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("impl", "steps"), [("chunked", 30), pytest.param("triton", 5, marks=ON_DEVICE)])
def test_all_implementations_train_along_the_same_curve(run, impl, steps, tied):
    first = student(tied)
    run("reference")
    wanted = curve(copy.deepcopy(first), 30)
    assert sum(wanted[-5:]) < 0.9 * sum(wanted[:5])
    run(impl)
    assert curve(copy.deepcopy(first), steps) == pytest.approx(wanted[:steps], rel=2e-5)
