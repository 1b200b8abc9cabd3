#!/bin/sh
# Runs nvcc and keeps what it says beside the object: for each kernel and architecture, how many
# registers it takes and how many bytes it spills. Printed only when the compilation fails.
object=
previous=
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
"$@" >"$object.log" 2>&1 || {
  status=$?
  cat "$object.log" >&2
  exit $status
}
