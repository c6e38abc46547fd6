"""Rules for operations which the levels and a trace must not run as they come."""
