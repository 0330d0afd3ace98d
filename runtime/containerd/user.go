// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/moby/sys/user"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/runtime"
)

// maxPasswd bounds what is read of a file that a tenant may have written.
const maxPasswd = 1 << 20

// maxCached bounds each cache. They are emptied when full: what they hold is
// quickly read again.
const maxCached = 512

// persona is what a user is to a process.
type persona struct {
	user specs.User
	home string
}

// userCache keeps what a user name of an image means. An image never changes,
// and looking costs a mount.
type userCache struct {
	mu   sync.Mutex
	seen map[[2]string]persona // chain id of the root, user as asked for
}

// imageUser answers the user of a task: as asked for, else the image's, else
// root.
func (r *Runtime) imageUser(ctx context.Context, image imageInfo, want string) (persona, error) {
	if want == "" {
		want = image.user
	}
	if want == "" {
		want = "0"
	}
	key := [2]string{image.chainID, want}
	c := &r.users
	c.mu.Lock()
	u, ok := c.seen[key]
	c.mu.Unlock()
	if ok {
		return u, nil
	}
	u, err := r.lookUpUser(ctx, image, want)
	if err != nil {
		return persona{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.seen == nil || len(c.seen) >= maxCached {
		c.seen = map[[2]string]persona{}
	}
	c.seen[key] = u
	return u, nil
}

// lookUpUser mounts the image's root read-only for as long as it takes to read
// two files.
func (r *Runtime) lookUpUser(ctx context.Context, image imageInfo, want string) (persona, error) {
	view := "user-" + randomID()
	ctx, cancel := r.finish(ctx)
	defer cancel()
	open := func() ([]mount.Mount, error) {
		return r.snapshots.View(ctx, view, image.chainID, snapshots.WithLabels(map[string]string{labelGCRoot: "lookup"}))
	}
	mounts, err := open()
	if isNotFound(err) {
		if err := r.unpack(ctx, image); err != nil {
			return persona{}, err
		}
		mounts, err = open()
	}
	if err != nil {
		return persona{}, fmt.Errorf("view image for user %s: %w", want, err)
	}
	defer func() {
		if err := r.removeSnapshot(ctx, view); err != nil {
			r.log.WarnContext(ctx, "remove view of image", "image", image.name, "err", err)
		}
	}()
	var u persona
	err = mount.WithReadonlyTempMount(ctx, mounts, func(root string) error {
		dir, err := os.Open(root)
		if err != nil {
			return err
		}
		defer dir.Close()
		u, err = resolveUser(dir, want)
		return err
	})
	if err != nil {
		return persona{}, fmt.Errorf("user %s in image %s: %w", want, image.name, err)
	}
	return u, nil
}

// liveUser answers what a user means in a running task, whose files may be
// anything by now.
func (r *Runtime) liveUser(t *task, want string) (persona, error) {
	path := "/proc/" + strconv.FormatUint(uint64(t.pid), 10) + "/root"
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return persona{}, fmt.Errorf("look up user %s: %w", want, runtime.ErrNotRunning)
	}
	if err != nil {
		return persona{}, fmt.Errorf("look up user %s: open %s: %w", want, path, err)
	}
	dir := os.NewFile(uintptr(fd), path)
	defer dir.Close()
	u, err := resolveUser(dir, want)
	if err != nil {
		return persona{}, fmt.Errorf("user %s: %w", want, err)
	}
	return u, nil
}

// resolveUser reads "user[:group]", names or numbers, by the passwd and group
// files below root. A number need not be in them.
func resolveUser(root *os.File, want string) (persona, error) {
	passwd, err := readBelow(root, "etc/passwd")
	if err != nil {
		return persona{}, err
	}
	group, err := readBelow(root, "etc/group")
	if err != nil {
		return persona{}, err
	}
	u, err := user.GetExecUser(want, &user.ExecUser{Home: "/"}, bytes.NewReader(passwd), bytes.NewReader(group))
	if err != nil {
		return persona{}, fmt.Errorf("%w: %w", runtime.ErrInvalidSpec, err)
	}
	out := persona{user: specs.User{UID: uint32(u.Uid), GID: uint32(u.Gid)}, home: u.Home}
	for _, g := range u.Sgids {
		out.user.AdditionalGids = append(out.user.AdditionalGids, uint32(g))
	}
	return out, nil
}

// readBelow reads a file of a root that may hold any link: links end inside,
// anything but a plain file is refused. A missing file is an empty one.
func readBelow(root *os.File, path string) ([]byte, error) {
	fd, err := unix.Openat2(int(root.Fd()), path, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("stat %s: %w", path, err)
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("read %s: not a plain file", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxPasswd+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(b) > maxPasswd {
		return nil, fmt.Errorf("read %s: more than %d bytes", path, maxPasswd)
	}
	return b, nil
}
