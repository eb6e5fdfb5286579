"""Plain torch: patches and causal Transformers. Knows nothing of likelihoods."""
