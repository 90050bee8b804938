"""An experiment in its work directory: finds files and opens what stages have made."""

from __future__ import annotations

import site
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.corpus.masking import Viewer
from ki_ds.corpus.stream import CorpusStream
from ki_ds.corpus.tokenizer import TextTokenizer
from ki_ds.corpus.tokens import Tokens, open_tokens
from ki_ds.digests import Digests
from ki_ds.engine import optimizers
from ki_ds.engine.config import EngineConfig, InferenceEngineConfig
from ki_ds.errors import UserError
from ki_ds.experiment.schema import Experiment
from ki_ds.experiment.strict import read_json
from ki_ds.sealed import open_sealed
from ki_ds.targets.source import Place, place

# where ds_configs stands: in a checkout, in an installed package
SHIPPED = (Path(__file__).parent.parent, *(Path(p) / "share" / "ki_ds" for p in (sys.prefix, site.getuserbase())))


class Workspace:
    """An experiment file's content, the folders where its relative paths are looked up, and the work directory."""

    def __init__(self, experiment: Experiment, source: Path, root: Path):
        self.experiment, self.root = experiment, root
        self.trust_checkpoints = False  # of other users
        self.redo = False  # make again what was made from something else
        folder = source.resolve().parent
        self.bases = [*dict.fromkeys([folder, *folder.parents, Path.cwd(), *SHIPPED])]
        self.digests = Digests(root)
        self._tokens: dict[str, Tokens] = {}
        self.expected_tokenizers: dict[bool, TextTokenizer] = {}  # what `stages.tokenizer` has found, by whether sealed

    # -------------------------------------------------------------------------------------------------- finding

    def find(self, path: str, place: str) -> Path:
        """An existing file: absolute, or relative to the experiment file's folder, one above it, or the current one.

        Raises:
            UserError: there is none.
        """
        for base in self.bases:
            if (base / path).exists():
                return base / path
        looked = f"{self.bases[0]}, the folders above it and {Path.cwd()}"
        raise UserError(f"{place}: there is no {path} (looked in {looked})")

    def folder_or_name(self, pretrained: str) -> str:
        """A folder that exists, looked up as `find` does, or else a name on the Hugging Face hub."""
        found = next((base / pretrained for base in self.bases if (base / pretrained).is_dir()), None)
        return str(found) if found else pretrained

    def stored(self, teacher: str, corpus: str) -> Place:
        """Where predictions lie that were made elsewhere."""
        given = (self.experiment.models[teacher].targets or {})[corpus]
        found = next((base / given for base in self.bases if "://" not in given and (base / given).exists()), None)
        return found or place(given)

    # -------------------------------------------------------------------------------------------------- opening

    @cached_property
    def engine_config(self) -> EngineConfig:
        """The DeepSpeed JSON, checked."""
        config = EngineConfig.read(*self._deepspeed_json(self.experiment.engine, "engine"))
        for name, model in self.experiment.models.items():
            if model.train:
                optimizers.check_fit(model.train, config, f"models.{name}")
        return config

    @cached_property
    def inference_config(self) -> InferenceEngineConfig | None:
        """The DeepSpeed JSON by which teachers are partitioned, checked; None: they are not."""
        given = self.experiment.inference
        if given.engine is None:
            return None
        return InferenceEngineConfig.read(*self._deepspeed_json(given.engine, "inference.engine"), given.precision)

    def _deepspeed_json(self, given: str | dict[str, Any], place: str) -> tuple[Any, str]:
        """The JSON, and where it comes from."""
        source = place if isinstance(given, dict) else str(self.find(given, place))
        return given if isinstance(given, dict) else read_json(Path(source)), source

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The experiment's tokenizer, once its stage is sealed.

        Raises:
            UserError: it is not, or was changed since.
        """
        folder = self.root / "tokenizer"
        sealed = open_sealed(folder)
        found = tokenizers.load(folder, self.experiment.objective, "tokenizer")
        if found.digest != sealed.digest:
            raise UserError(
                f"{folder}: was changed after it was sealed: it gives other ids. Put the original back, or remove the "
                "folder and run again: it is made anew."
            )
        return found

    def tokens(self, corpus: str) -> Tokens:
        """A sealed corpus."""
        if corpus not in self._tokens:
            self._tokens[corpus] = open_tokens(self.root / "corpora" / corpus)
        return self._tokens[corpus]

    def stream(self, corpus: str) -> CorpusStream:
        """The stream over a corpus's training part."""
        tokens = self.tokens(corpus)
        return CorpusStream(len(tokens.train), self.experiment.views, self.experiment.seed, tokens.digest)

    def viewer(self, corpus: str) -> Viewer:
        """Makes the views of a corpus's sequences."""
        e, t = self.experiment, self.tokenizer
        return Viewer(
            e.objective, e.seed, self.tokens(corpus).digest, t.size, t.special, t.mask, e.masking.probability
        )  # fmt: skip
