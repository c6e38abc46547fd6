"""The commands of `funcstage`: plan, check, timeline; the demo is a package of its own."""
