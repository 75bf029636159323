"""The plan of a training run on paper: memory, collectives, time.

Everything follows from shapes, logical axes and constants with a source;
nothing here makes an array. `plan.make_plan` is the way in.
"""
