"""The fault matrix: a real cluster under load, one kind of fault after the other, and a look at what is left.

`python -m benchmarks.chaos` starts the laptop profile on ports and in a state folder of its own, keeps jobs flowing,
and does to the cluster what power cuts, kernels and people do: at random times, from a seed that it prints. When all
is quiet again it reads the rows, the files and what the receiver of callbacks got, and says which promise was broken.

    cluster.py     the cluster, as processes that can be found, killed and started again
    rows.py        rows of its database, for whoever looks
    load.py        the jobs: submitted until they are acknowledged, some cancelled
    mix.py         what they ask for
    receiver.py    the receiver of callbacks, which verifies and keeps everything, and can misbehave
    scene.py       what a fault may touch, and when it strikes
    faults.py      what is done to them
    suspension.py  the replica that sleeps through the loss of its lease
    record.py      what is left: rows, files and receipts, as objects
    checks.py      the promises, each a function from the record to violations
    overlay.py     a copy of the code with its fence removed, which must make the checks fail
"""
