"""Several processes that hold one model together: what each of them reads, and how they agree while they load."""
