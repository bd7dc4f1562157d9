"""What work on a model will take, before it starts: forward passes, time and memory."""
