"""The process in which xllamacpp runs: it prints its address, and ends when nobody holds its standard input any more."""

from __future__ import annotations

import os
import sys


def main() -> None:
    path, (context, threads, chats, gpu_layers) = sys.argv[1], map(int, sys.argv[2:6])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp writes its log where it likes
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = context
    parameters.n_parallel = chats
    if chats > 1:
        parameters.kv_unified = True  # one memory for all, so that a single chat may fill it
        parameters.swa_full = True  # else sliding layers throw keys away that the chat's next turn begins with
    parameters.n_gpu_layers = gpu_layers
    parameters.warmup = False
    parameters.no_extra_bufts = True  # no second copy of the weights in another order
    parameters.use_jinja = True
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    parameters.n_threads_http = chats + 2  # a reply that streams keeps one
    server = xllamacpp.Server(parameters)
    out.write(f"{server.listening_address}\n")
    out.flush()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
