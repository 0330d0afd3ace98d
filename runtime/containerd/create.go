// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/runtime/logs"
)

// Labels by which a later process knows what this one made.
const (
	labelLogDir   = "io.bulkhead.log-dir"
	labelLogMax   = "io.bulkhead.log-max"
	labelLogFiles = "io.bulkhead.log-files"
	labelSnapshot = "io.bulkhead.sandbox" // on snapshots: the id
	labelGCRoot   = "containerd.io/gc.root"
)

// undo is a stack of what an interrupted Create has to take back.
type undo []func(context.Context) error

func (u *undo) push(f func(context.Context) error) { *u = append(*u, f) }

// run takes everything back, last made first.
func (u undo) run(ctx context.Context) error {
	var errs []error
	for i := len(u) - 1; i >= 0; i-- {
		errs = append(errs, u[i](ctx))
	}
	return errors.Join(errs...)
}

// Create makes snapshot, container and task. Steps that do not need each other
// run at once. The context is looked at between them and cuts none short:
// what a call of unknown outcome has made cannot be taken back for certain.
func (r *Runtime) Create(ctx context.Context, s runtime.Spec) (_ runtime.Task, err error) {
	if err := validate(s); err != nil {
		return nil, fmt.Errorf("create %s: %w", s.ID, err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("create %s: %w", s.ID, err)
		}
	}()
	image, err := r.imageInfo(ctx, s.Image)
	if err != nil {
		return nil, err
	}
	who, err := r.imageUser(ctx, image, s.User)
	if err != nil {
		return nil, err
	}
	spec, err := bundle{spec: s, image: image, who: who, limits: readHostLimits()}.build(ctx, r.cfg.Namespace)
	if err != nil {
		return nil, err
	}
	record, err := r.record(s, image, spec)
	if err != nil {
		return nil, err
	}
	defer r.lock(s.ID)()
	if err := ctx.Err(); err != nil {
		return nil, err
	}

	var back undo
	defer func() {
		if err == nil {
			return
		}
		// As long as everything that has to be taken back may take.
		uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*r.cfg.CallLimit)
		defer cancel()
		if uerr := back.run(uctx); uerr != nil {
			r.log.ErrorContext(ctx, "undo of create", "sandbox", s.ID, "err", uerr)
			err = errors.Join(err, fmt.Errorf("undo: %w", uerr))
		}
	}()

	mounts, err := r.prepare(ctx, image, record, &back)
	if err != nil {
		return nil, err
	}
	stdio, err := r.openStdio(s, &back)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	t, err := r.createTask(ctx, s, stdio, spec, mounts, &back)
	if err != nil {
		return nil, err
	}
	r.remember(t)
	return t, nil
}

// record is the container as containerd stores it.
func (r *Runtime) record(s runtime.Spec, image imageInfo, spec *specs.Spec) (containers.Container, error) {
	options, err := typeurl.MarshalAny(&runcoptions.Options{BinaryName: r.cfg.Runc, Root: r.cfg.RuncRoot})
	if err != nil {
		return containers.Container{}, fmt.Errorf("encode runc options: %w", err)
	}
	specAny, err := typeurl.MarshalAny(spec)
	if err != nil {
		return containers.Container{}, fmt.Errorf("encode OCI spec: %w", err)
	}
	cfg := logConfig(s)
	labels := map[string]string{
		labelLogDir:   cfg.Dir,
		labelLogMax:   strconv.FormatInt(cfg.MaxBytes, 10),
		labelLogFiles: strconv.Itoa(cfg.Files),
	}
	for k, v := range s.Labels {
		if _, ours := labels[k]; ours {
			return containers.Container{}, fmt.Errorf("%w: label %s is reserved", runtime.ErrInvalidSpec, k)
		}
		labels[k] = v
	}
	return containers.Container{
		ID:          s.ID,
		Labels:      labels,
		Image:       image.name,
		Runtime:     containers.RuntimeInfo{Name: shimRuntime, Options: options},
		Spec:        specAny,
		SnapshotKey: s.ID,
		Snapshotter: r.cfg.Snapshotter,
	}, nil
}

func logConfig(s runtime.Spec) logs.Config {
	cfg := logs.Config{Dir: s.LogDir, MaxBytes: s.LogMaxBytes, Files: s.LogFiles}
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = runtime.DefaultLogMaxBytes
	}
	if cfg.Files == 0 {
		cfg.Files = runtime.DefaultLogFiles
	}
	return cfg
}

// logConfigOf reads what record has stored.
func logConfigOf(labels map[string]string) (logs.Config, error) {
	maxBytes, err1 := strconv.ParseInt(labels[labelLogMax], 10, 64)
	files, err2 := strconv.Atoi(labels[labelLogFiles])
	if err := errors.Join(err1, err2); err != nil {
		return logs.Config{}, fmt.Errorf("log labels: %w", err)
	}
	return logs.Config{Dir: labels[labelLogDir], MaxBytes: maxBytes, Files: files}, nil
}

// loggerURI makes the shim start the logger. With binary-v2 it fails to create
// the task if the logger does not come up; with plain binary the command would
// run into a closed pipe.
func (r *Runtime) loggerURI(cfg logs.Config) string {
	q := url.Values{
		"dir":   {cfg.Dir},
		"max":   {strconv.FormatInt(cfg.MaxBytes, 10)},
		"files": {strconv.Itoa(cfg.Files)},
	}
	return (&url.URL{Scheme: "binary-v2", Path: r.cfg.Logger, RawQuery: q.Encode()}).String()
}

// prepare makes the snapshot, the container and its hold, all at once.
func (r *Runtime) prepare(ctx context.Context, image imageInfo, record containers.Container, back *undo) ([]mount.Mount, error) {
	var mounts []mount.Mount
	parts := []struct {
		name string
		do   func(context.Context) error
		undo func(context.Context, string) error
		err  error
	}{
		{name: "snapshot", undo: r.removeSnapshot, do: func(ctx context.Context) (err error) {
			mounts, err = r.snapshot(ctx, record.ID, image)
			return err
		}},
		{name: "container", undo: r.removeContainer, do: func(ctx context.Context) error {
			ctx, cancel := r.finish(ctx)
			defer cancel()
			_, err := r.client.ContainerService().Create(ctx, record)
			return err
		}},
		{name: "hold", undo: r.removeHold, do: func(ctx context.Context) error {
			ctx, cancel := r.finish(ctx)
			defer cancel()
			_, err := r.client.SandboxStore().Create(ctx, sandbox.Sandbox{ID: record.ID})
			return err
		}},
	}
	var wg sync.WaitGroup
	for i := range parts {
		wg.Go(func() { parts[i].err = parts[i].do(ctx) })
	}
	wg.Wait()
	var errs []error
	for _, p := range parts {
		if isExists(p.err) {
			// Somebody else's: it stays.
			errs = append(errs, fmt.Errorf("%s: %w", p.name, runtime.ErrExists))
			continue
		}
		// Any other error may hide a success.
		back.push(func(ctx context.Context) error { return p.undo(ctx, record.ID) })
		if p.err != nil {
			errs = append(errs, fmt.Errorf("make %s: %w", p.name, p.err))
		}
	}
	if len(errs) > 0 {
		return nil, errs[0]
	}
	return mounts, nil
}

// snapshot makes the writable layer. It is a root of the garbage collector by
// itself: that saves the two calls of a lease, and the container that will hold
// it is made at the same time.
func (r *Runtime) snapshot(ctx context.Context, id string, image imageInfo) ([]mount.Mount, error) {
	labels := snapshots.WithLabels(map[string]string{
		labelSnapshot: id,
		labelGCRoot:   time.Now().UTC().Format(time.RFC3339),
	})
	prepare := func() ([]mount.Mount, error) {
		ctx, cancel := r.finish(ctx)
		defer cancel()
		return r.snapshots.Prepare(ctx, id, image.chainID, labels)
	}
	mounts, err := prepare()
	if isNotFound(err) {
		// The image is there, its unpacked layers are not: somebody pulled it
		// by other means.
		if err := r.unpack(ctx, image); err != nil {
			return nil, err
		}
		return prepare()
	}
	return mounts, err
}

// createTask has the shim create the task. From then on undoing begins with
// removing it.
func (r *Runtime) createTask(ctx context.Context, s runtime.Spec, stdio *stdio, spec *specs.Spec, mounts []mount.Mount, back *undo) (*task, error) {
	req := &tasksapi.CreateTaskRequest{
		ContainerID: s.ID,
		Stdin:       stdio.stdin,
		Stdout:      stdio.stdout,
		Stderr:      stdio.stderr,
		Terminal:    s.Terminal,
	}
	for _, m := range mounts {
		req.Rootfs = append(req.Rootfs, &types.Mount{
			Type: m.Type, Source: m.Source, Target: m.Target,
			// Device nodes that an image brings mean nothing.
			Options: append(m.Options, "nodev"),
		})
	}
	ctx, cancel := r.finish(ctx)
	defer cancel()
	resp, err := r.tasks.Create(ctx, req)
	if err != nil {
		n := native(err)
		if errdefs.IsAlreadyExists(n) {
			return nil, fmt.Errorf("task: %w", runtime.ErrExists)
		}
		back.push(func(ctx context.Context) error { return r.removeTask(ctx, s.ID) })
		return nil, fmt.Errorf("create task: %w", commandError(n))
	}
	t := &task{
		r:        r,
		id:       s.ID,
		pid:      resp.Pid,
		process:  spec.Process,
		terminal: s.Terminal,
		memory:   s.MemoryBytes > 0,
		relay:    stdio.relay,
	}
	if t.relay != nil {
		t.relay.run(&r.wg)
	}
	return t, nil
}

// stdio is what the shim is told of a task's streams.
type stdio struct {
	stdin, stdout, stderr string
	relay                 *relay // nil with a logger
}

// openStdio makes the FIFOs of an interactive task, or names the logger.
func (r *Runtime) openStdio(s runtime.Spec, back *undo) (*stdio, error) {
	cfg := logConfig(s)
	if err := os.MkdirAll(cfg.Dir, 0o750); err != nil {
		return nil, fmt.Errorf("make log directory: %w", err)
	}
	if !s.Terminal && !s.Stdin {
		uri := r.loggerURI(cfg)
		return &stdio{stdout: uri, stderr: uri}, nil
	}
	dir := r.fifoDir(s.ID)
	// Whatever is there is of a task that is certainly gone: its container
	// would have stopped us.
	if err := os.RemoveAll(dir); err != nil {
		return nil, fmt.Errorf("clear FIFOs: %w", err)
	}
	back.push(func(context.Context) error { return os.RemoveAll(dir) })
	f, err := makeFIFOs(dir, true, !s.Terminal)
	if err != nil {
		return nil, err
	}
	rel := newRelay(r, s.ID, f, s.Terminal, cfg)
	back.push(func(context.Context) error { rel.close(); return nil })
	return &stdio{stdin: f.stdin, stdout: f.stdout, stderr: f.stderr, relay: rel}, nil
}

func (r *Runtime) fifoDir(id string) string { return filepath.Join(r.cfg.Dir, id) }
