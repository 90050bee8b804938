"""One module a stage, the list of them, and the pipeline that runs them.

A new stage is one new module, and one line here.
"""

from ki_ds.stages.corpus import Corpus
from ki_ds.stages.evaluate import Evaluate
from ki_ds.stages.report import Report
from ki_ds.stages.stage import Stage
from ki_ds.stages.teach import Teach
from ki_ds.stages.tokenizer import Tokenizer
from ki_ds.stages.train import Train

STAGES: list[type[Stage]] = [Tokenizer, Corpus, Teach, Train, Evaluate, Report]
