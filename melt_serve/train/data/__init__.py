"""What is learnt from: records, documents, packs, batches."""
