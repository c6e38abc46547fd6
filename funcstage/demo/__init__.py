"""The demo: a small language model, trained as a pipeline, and a look at its schedule.

text.py    real text as bytes
model.py   a transformer, and where to cut it into stages
adamw.py   the optimizer, as a pair of pure functions
train.py   the training loop
distributed.py  the pipeline, in one process or in those that torchrun started
measure.py what F, I and W of each stage cost
report.py  what the user sees
run.py     all of it in order
"""
