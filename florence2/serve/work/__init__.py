"""Jobs from the moment they are accepted to their answers: a bounded queue, a cache of images, a worker.

A worker pulls from the queue when it has room, so that one queue can feed several. Begin with `worker.Worker`.
"""
