"""The bundled checkpoints' task, who is where: questions, tokenizer, chat template, evaluation."""
