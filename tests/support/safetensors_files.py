"""Reads and writes safetensors files of any dtype for tests.

Straight from the description of the format: the package's numpy functions know
no FP8.
"""

import json
import os

import ml_dtypes
import numpy as np

_DTYPES = {
  'F32': np.float32,
  'F64': np.float64,
  'I32': np.int32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'F8_E4M3': ml_dtypes.float8_e4m3fn,
  'F8_E5M2': ml_dtypes.float8_e5m2,
}


def load(path: str | os.PathLike) -> dict[str, np.ndarray]:
  with open(path, 'rb') as file:
    header = json.loads(file.read(int.from_bytes(file.read(8), 'little')))
    data = file.read()
  header.pop('__metadata__', None)
  tensors = {}
  for name, entry in header.items():
    begin, end = entry['data_offsets']
    value = np.frombuffer(data[begin:end], _DTYPES[entry['dtype']])
    tensors[name] = value.reshape(entry['shape']).copy()
  return tensors


def save(tensors: dict[str, np.ndarray], path: str | os.PathLike) -> None:
  spelt = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
  header, data = {'__metadata__': {'format': 'pt'}}, b''
  for name, value in tensors.items():
    end = len(data) + value.nbytes
    header[name] = {
      'dtype': spelt[value.dtype],
      'shape': value.shape,
      'data_offsets': [len(data), end],
    }
    data += value.tobytes()
  text = json.dumps(header).encode()
  with open(path, 'wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text + data)
