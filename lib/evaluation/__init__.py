"""Evaluation of a trained density VAE: likelihoods, samples, pictures."""
