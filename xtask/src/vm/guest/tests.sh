# The test programs, at the path at which they were built. Each line is cargo-nextest's, behind `> `.

# link PATH: PATH leads to where the payload has it.
link() {
    [ -e "$1" ] && return
    mkdir -p "$(dirname "$1")"
    ln -s "$2" "$1"
}

link "$CHECKOUT" /payload/checkout
link "$TARGET" /payload/target
cd "$CHECKOUT" || exit 1
/payload/cargo-nextest nextest run --binaries-metadata /payload/binaries.json \
    --cargo-metadata /payload/cargo.json --no-fail-fast --color never --show-progress none \
    --status-level all --final-status-level none --success-output immediate --failure-output immediate \
    2>&1 | sed --unbuffered 's/^/> /'
cd "$GUEST" || exit 1
