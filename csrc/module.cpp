// evkernels._C. Importing it registers every compiled kernel, CPU and CUDA, with PyTorch's dispatcher; it holds nothing
// else.

#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
