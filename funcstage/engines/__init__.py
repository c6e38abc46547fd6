"""The engines: each is a way from a stage call to F, I and W."""
