#!/bin/bash
# Builds Kubernetes 1.20.2 from Debian's source package: `build.sh DIR` leaves DIR/kubernetes, one program that is API server, controller
# manager, scheduler or kubelet by its first argument. Minutes, so DIR is a cache: a finished one is left alone. Needs golang-go and dpkg-dev.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$1
stamp=$(cat "$here/build.sh" "$here/hyperkube.go" | sha256sum | cut -c1-16)
if [ "$(cat "$dir/stamp" 2>/dev/null)" = "$stamp" ]; then exit 0; fi
echo "building Kubernetes into $dir, minutes"
rm -rf "$dir"
mkdir -p "$dir"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# The machine's own Debian sources, as sources of source packages.
mkdir -p apt/lists/partial apt/cache/archives/partial
sed 's/^Types: deb$/Types: deb-src/' /etc/apt/sources.list.d/debian.sources >apt/src.sources
apt=(apt-get -q -q -o Dir::Etc::sourcelist="$work/apt/src.sources" -o Dir::Etc::sourceparts=/dev/null -o Dir::State::lists="$work/apt/lists"
     -o Dir::Cache="$work/apt/cache" -o APT::Sandbox::User=root)
"${apt[@]}" update
"${apt[@]}" source --download-only kubernetes golang-github-modern-go-reflect2
export GOPATH=$work/go GOCACHE=$work/gocache HOME=$work GO111MODULE=off GOPROXY=off GOFLAGS= CGO_ENABLED=0 GOGC=400
source=$GOPATH/src/k8s.io/kubernetes
mkdir -p "$GOPATH/src/k8s.io"
dpkg-source -x kubernetes_*.dsc "$source" >/dev/null
dpkg-source -x golang-github-modern-go-reflect2_*.dsc reflect2 >/dev/null
# The vendored reflect2 1.0.1 crashes under Go 1.18 and newer (iteration of maps): Debian's 1.0.2 takes its place.
rm -rf "$source/vendor/github.com/modern-go/reflect2"
cp -r reflect2 "$source/vendor/github.com/modern-go/reflect2"
cd "$source"

# The API server's one generated file that the source package leaves out.
go build -o "$work/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
packages=$(
    { grep -rlE --include='*.go' '\+k8s:openapi-gen=' pkg cmd plugin
      grep -RlE --include='*.go' '\+k8s:openapi-gen=' vendor/k8s.io | grep -vE 'code-generator|sample-|gengo|kube-openapi'; } |
        xargs dirname | LC_ALL=C sort -u | grep -v /generated/ | sed 's#^#k8s.io/kubernetes/#' | paste -sd,)
"$work/openapi-gen" -i "$packages" -p k8s.io/kubernetes/pkg/generated/openapi -O zz_generated.openapi -h vendor/k8s.io/code-generator/hack/boilerplate.go.txt \
    -r "$work/violations"

mkdir cmd/hyperkube
cp "$here/hyperkube.go" cmd/hyperkube/main.go
flags="-s -w"
for package in component-base/version client-go/pkg/version; do
    flags+=" -X k8s.io/kubernetes/vendor/k8s.io/$package.gitVersion=v1.20.2 -X k8s.io/kubernetes/vendor/k8s.io/$package.gitMajor=1"
    flags+=" -X k8s.io/kubernetes/vendor/k8s.io/$package.gitMinor=20"
done
# Without the code for the clouds of Amazon, Google, Microsoft and VMware, which takes half of the time.
go build -tags providerless -ldflags "$flags" -o "$dir/kubernetes" ./cmd/hyperkube
"$dir/kubernetes" kube-apiserver --version
echo "$stamp" >"$dir/stamp"
