"""ki_ds: knowledge inheritance on DeepSpeed (Qin et al., NAACL 2022)."""

__version__ = "0.1.0"
