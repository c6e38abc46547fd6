"""The demo: a small language model, trained as a pipeline in one process, and a look at its schedule.

text.py    real text as bytes
model.py   a transformer, cut into stages
adamw.py   the optimizer, as a pair of pure functions
train.py   the training loop
measure.py what F, I and W of each stage cost
report.py  what the user sees
run.py     all of it in order
"""
