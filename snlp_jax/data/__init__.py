"""Text to batches: a corpus of documents, a tokenizer, and checkpointable iterators over windows of tokens."""
