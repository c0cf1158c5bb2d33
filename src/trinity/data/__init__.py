"""Floor 3: from files to documents to token shards to training batches."""
