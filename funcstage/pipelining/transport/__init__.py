"""Messages between the stages of a pipeline, written straight into the receiver's memory."""
