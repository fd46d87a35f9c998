"""The bundled checkpoints' task: who is where. Asked by the demo, load tests, benches, training and tests."""
