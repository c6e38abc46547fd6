"""What `python -m funcstage` can be asked: plan, check, timeline; the demo is a package of its own."""
