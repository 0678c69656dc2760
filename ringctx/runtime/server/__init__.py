"""Server: OpenAI-style HTTP on rank 0; every rank works on one job after another, in the order in which they came.

bodies what clients may ask -> desk a queue between HTTP and the ring -> host all ranks perform a job -> app the replies.
"""
