"""What a post-training takes: memory, arithmetic and time, planned and measured."""
