"""One module a stage, and the pipeline that runs them."""
