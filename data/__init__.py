"""Text to tokens: fetching, cleaning, tokenizers, shards, loading. Knows nothing of models."""
