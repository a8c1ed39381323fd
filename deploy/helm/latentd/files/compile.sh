# compile.sh BACKEND BUNDLE...: compile what each bundle lacks for this GPU. Pods that share the volume take turns, by the
# lock of servers that compile at their start.
set -eu
backend=$1
shift
for bundle in "$@"; do
  flock "$bundle/.compiling" python -m build_engines compile "$bundle" --backend "$backend"
done
