"""Spatial Dependency Networks: layers (`lib.nn`), likelihoods (`lib.probability`) and the models
built on them."""
