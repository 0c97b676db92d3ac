"""`make gpu-check`: one command that builds, proves and measures the GPU paths on one machine.

Every stage runs in a process of its own with a time box, so that one that hangs, crashes or spoils
the GPU's context stops nothing else; what a stage has found is on disk as soon as it is found.
"""
