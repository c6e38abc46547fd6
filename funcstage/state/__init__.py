"""The state around a stage: its module's, and the one that it finds in the process and the thread."""
