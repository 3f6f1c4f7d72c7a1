"""Jobs from the moment they are accepted to their answers: a bounded queue, a cache of images, a worker.

Workers pull from the one queue when they have room: `worker.Worker` in this process, or a `crew.Crew` of processes, one
for each device. Begin with `worker.Worker`.
"""
