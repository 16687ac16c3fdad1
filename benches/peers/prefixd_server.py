"""A prefixd server of a script's own: it starts on a free port, answers over gRPC, and ends with the `with` block.

Needs: grpcio, grpcio-tools (the calls are made from ../../proto at run time), Linux.
"""
import os, pathlib, signal, socket, subprocess, sys, time

import grpc, grpc_tools

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"
sys.path += [str(PROTO), str(pathlib.Path(grpc_tools.__file__).parent / "_proto")]  # where grpc looks for what it compiles
adapters, adapters_rpc = grpc.protos_and_services("prefixd/v1/adapters.proto")
inference, inference_rpc = grpc.protos_and_services("prefixd/v1/inference.proto")
server, server_rpc = grpc.protos_and_services("prefixd/v1/server.proto")
training, training_rpc = grpc.protos_and_services("prefixd/v1/training.proto")

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a script that is told to end leaves its blocks, and so ends what it started

MESSAGE = 1 << 28  # bytes; the log of a long training is more than gRPC's 4 MiB


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Prefixd:
    """`options` are those of `prefixd serve`."""

    def __init__(self, program, model, store, *options, patience=600):
        address = f"127.0.0.1:{free_port()}"
        command = [program, "serve", "--model", model, "--adapters", store, "--listen", address, *options]
        self.process = subprocess.Popen([str(x) for x in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                        env=os.environ | {"PREFIXD_LOG": "error"})
        limits = [("grpc.max_receive_message_length", MESSAGE), ("grpc.max_send_message_length", MESSAGE)]
        self.channel = grpc.insecure_channel(address, limits)
        self.inference = inference_rpc.InferenceServiceStub(self.channel)
        self.adapters = adapters_rpc.AdapterServiceStub(self.channel)
        self.training = training_rpc.TrainingServiceStub(self.channel)
        self.about = server_rpc.ServerServiceStub(self.channel)
        try:
            self.info = self.wait(patience)
        except BaseException:
            self.__exit__()
            raise

    def wait(self, patience):
        """Facts about the server, once it is up."""
        start = time.time()
        while time.time() < start + patience:
            if self.process.poll() is not None:
                raise SystemExit(f"prefixd serve: {self.process.stderr.read()}")
            try:
                return self.about.GetServerInfo(server.GetServerInfoRequest(), timeout=5)
            except grpc.RpcError:
                time.sleep(0.1)
        raise SystemExit(f"prefixd serve: not up after {patience} s")

    def stats(self):
        return self.about.GetStats(server.GetStatsRequest())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()
        self.process.terminate()
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
