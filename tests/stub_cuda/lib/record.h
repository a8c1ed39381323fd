/* What the stub libraries tell of a call: one line of JSON in the file that STUB_CUDA_RECORD names. libcudart.so.13
   has the functions; the other libraries are linked to it. */
#ifndef RECORD_H
#define RECORD_H
#include <stddef.h>
/* A call of kind `what` ("kernel", "sync", ...), of which `name` tells more, with a number such as its bytes. */
void stub_record(const char *what, const char *name, size_t number);
/* As above; the library launches it as a kernel, so it becomes part of an open capture. */
void stub_launch(const char *name);
#endif
