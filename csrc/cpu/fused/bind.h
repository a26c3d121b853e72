// The Python bindings of the fused engine's kernels.
#pragma once

#include <pybind11/pybind11.h>

#include "fused.h"

void use_fused(const swamp::FusedTables& tables);
void bind_fused(pybind11::module_& m);
