"""Fakes: a GPU that both ends reach, made of memory of this process, its carriers, and leases."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import torch

from luna_mp.errors import OutOfMemory
from luna_mp.wire.carrier import Carrier, CarrierFailed, NoRoom

UUID = "11111111-2222"


class FakeGpu:
    """What was exported, by number; `is_lost`: no client can open any of it any more."""

    def __init__(self):
        self.exported = {}
        self.is_lost = False

    def export(self, tensor):
        number = len(self.exported) + 1
        # The service's mode is not that of a client, whose tensor this is to be.
        with torch.inference_mode(False):
            self.exported[number] = tensor.clone()
        return number


class ServiceEnd(Carrier):
    name = "cuda"

    def __init__(self, gpu):
        self._gpu = gpu

    def pack(self, tensor, out):
        return (self._gpu.export(tensor),)

    def unpack(self, token, source):
        return self._gpu.exported[token[0]]


class ServiceEndThatCannotExport(ServiceEnd):
    def pack(self, tensor, out):
        raise RuntimeError("CUDA error: operation not supported\nadvice")


class ServiceEndThatFailsLater(ServiceEnd):
    """Once its GPU is lost, it can export no more."""

    def pack(self, tensor, out):
        if self._gpu.is_lost:
            raise CarrierFailed("cuda: No space left on device")
        return super().pack(tensor, out)


class FakeCounter:
    holders = 1
    retired = 0

    def value(self):
        return self.holders

    def release(self):
        self.holders = 0

    def retire(self):
        self.retired += 1


class FakeFence:
    is_done = False

    def query(self):
        return self.is_done


class FakeBook:
    def __init__(self):
        self.collected = threading.Event()

    def wait_for_room(self, owner, deadline):
        pass

    def has_room(self, owner):
        return True

    def collect(self):
        self.collected.set()


class FullBook(FakeBook):
    """Everybody holds their share."""

    def wait_for_room(self, owner, deadline):
        raise OutOfMemory("drop results, or ask for device='cpu'")

    def has_room(self, owner):
        return False


class FakeExporter:
    device = torch.device("cpu")

    def __init__(self, gpu, end=ServiceEnd, uuid=UUID):
        self.uuid = uuid
        self.book = FakeBook()
        self._gpu = gpu
        self._end = end

    def carrier(self, owner, host):
        return self._end(self._gpu)

    def beside(self):
        return nullcontext()

    def place(self, step):
        return step()


class ClientEnd(Carrier):
    """Hands out the very memory, and sends what came from there by its number."""

    name = "cuda"

    def __init__(self, gpu):
        self._gpu = gpu
        self._leased = {}

    def pack(self, tensor, out):
        number = self._leased.get(tensor.data_ptr())
        if number is None:
            raise NoRoom("this tensor is not the service's")
        self._check()
        return (number,)

    def unpack(self, token, source):
        self._check()
        tensor = self._open(self._gpu.exported[token[0]])
        self._leased[tensor.data_ptr()] = token[0]
        return tensor

    def _open(self, memory):
        return memory

    def _check(self):
        if self._gpu.is_lost:
            raise CarrierFailed("cuda: invalid resource handle")


class ClientEndThatMisreads(ClientEnd):
    def _open(self, memory):
        return memory.bitwise_xor_(1)


class ClientEndOverACopy(ClientEnd):
    """What it writes arrives nowhere."""

    def _open(self, memory):
        return memory.clone()


class ClientEndThatOpensNothing(ClientEnd):
    def _open(self, memory):
        raise CarrierFailed("cuda: peer access is not supported\nadvice")


class FakeImporter:
    """Counts the connections for which the GPU was tried."""

    def __init__(self, gpu, end=ClientEnd):
        self.tried = 0
        self.has_rested = threading.Event()
        self._gpu = gpu
        self._end = end

    def uuids(self):
        return ["00000000-0000", UUID]

    def carrier(self, uuid, service, host):
        assert uuid == UUID
        self.tried += 1
        return self._end(self._gpu)

    def rest(self):
        self.has_rested.set()


class ImporterWithoutRuntime(FakeImporter):
    def carrier(self, uuid, service, host):
        raise RuntimeError("this process's allocator needs the package cuda-bindings")
