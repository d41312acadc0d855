"""cupy.cuda, in part: one device, always there, never busy."""

import time as _time


class runtime:
    class CUDARuntimeError(RuntimeError):
        pass

    @staticmethod
    def getDeviceCount():
        return 1

    @staticmethod
    def getDeviceProperties(device):
        return {"name": b"stand-in"}

    @staticmethod
    def runtimeGetVersion():
        return 13000


class Device:
    def __init__(self, device=0):
        self.id = device

    def synchronize(self):
        pass


class Stream:
    def synchronize(self):
        pass


Stream.null = Stream()


class Event:
    """A moment on the device. Like CuPy's it can be asked for once it was recorded and waited for."""

    def __init__(self):
        self._recorded, self._over = None, False

    def record(self):
        self._recorded, self._over = _time.perf_counter(), False

    def synchronize(self):
        self._over = True


def get_elapsed_time(start_event, end_event):
    """Milliseconds."""
    if start_event._recorded is None or not end_event._over:
        raise runtime.CUDARuntimeError("cudaErrorNotReady: device not ready")
    return 1e3 * (end_event._recorded - start_event._recorded)


def is_available():
    return True
