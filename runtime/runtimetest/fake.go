// SPDX-License-Identifier: Apache-2.0

package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/bulkheadhq/bulkhead/runtime"
)

// ErrCrash, answered by a Fault, breaks Create off as a dead process would:
// what it has made stays.
var ErrCrash = errors.New("crashed")

// Node is what a Fake's process leaves behind when it ends.
type Node struct {
	mu     sync.Mutex
	tasks  map[string]*fakeTask
	half   map[string]bool // ids with leftovers but no task
	images map[string]runtime.Image
	pid    uint32

	// Fault, if set, is called before every step of a call, with the name of
	// the step and the id or image it is about. An error that it answers is the
	// call's. Set it before the Node is used. Steps: create:snapshot,
	// create:container, create:task, start, find, wait, status, kill, exec,
	// attach, resize, remove:task, remove:container, remove:snapshot, list,
	// image, images, import, pull, version.
	Fault func(step, key string) error
}

// NewNode answers an empty node.
func NewNode() *Node {
	return &Node{tasks: map[string]*fakeTask{}, half: map[string]bool{}, images: map[string]runtime.Image{}, pid: 1000}
}

// AddImage puts an image into the store without an archive.
func (n *Node) AddImage(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.images[name] = runtime.Image{Name: name, Digest: "sha256:" + strings.Repeat("0", 64), SizeBytes: 1, Created: time.Now()}
}

func (n *Node) fault(step, key string) error {
	if n.Fault == nil {
		return nil
	}
	return n.Fault(step, key)
}

// Specs answers what Create was given for the tasks that are there, by id.
func (n *Node) Specs() map[string]runtime.Spec {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := map[string]runtime.Spec{}
	for id, t := range n.tasks {
		out[id] = t.spec
	}
	return out
}

// Lose drops a task as if its shim had been killed and cleaned up after.
func (n *Node) Lose(id string) {
	n.mu.Lock()
	t := n.tasks[id]
	delete(n.tasks, id)
	n.half[id] = true
	n.mu.Unlock()
	if t != nil {
		t.end()
	}
}

// Open answers a runtime on the node, as a started process would have it.
func (n *Node) Open() *Fake {
	ctx, cancel := context.WithCancel(context.Background())
	return &Fake{node: n, ctx: ctx, cancel: cancel}
}

// Fake is a runtime.Runtime.
type Fake struct {
	node   *Node
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
}

var _ runtime.Runtime = (*Fake)(nil)

// Close ends this runtime's Waits; tasks run on.
func (f *Fake) Close() error {
	f.cancel()
	return nil
}

// Version of the miniature.
func (f *Fake) Version(context.Context) (string, error) {
	return "fake", f.node.fault("version", "")
}

// Create makes a task.
func (f *Fake) Create(ctx context.Context, s runtime.Spec) (runtime.Task, error) {
	n := f.node
	if err := validate(s); err != nil {
		return nil, fmt.Errorf("create %s: %w", s.ID, err)
	}
	if _, err := f.Image(ctx, s.Image); err != nil {
		return nil, fmt.Errorf("create %s: %w", s.ID, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.tasks[s.ID] != nil || n.half[s.ID] {
		return nil, fmt.Errorf("create %s: %w", s.ID, runtime.ErrExists)
	}
	if len(s.Command) == 0 {
		s.Command = []string{"/bin/sh"}
	}
	for _, step := range []string{"create:snapshot", "create:container", "create:task"} {
		if err := n.fault(step, s.ID); err != nil {
			n.half[s.ID] = errors.Is(err, ErrCrash)
			if !n.half[s.ID] {
				delete(n.half, s.ID)
			}
			return nil, fmt.Errorf("create %s: %w", s.ID, err)
		}
	}
	if !programs[s.Command[0]] {
		return nil, fmt.Errorf("create %s: %w: exec: %q: not found", s.ID, runtime.ErrCommand, s.Command[0])
	}
	n.pid++
	t := newFakeTask(n, n.pid, s)
	n.tasks[s.ID] = t
	return &handle{f: f, fakeTask: t}, nil
}

// Find answers a task.
func (f *Fake) Find(_ context.Context, id string) (runtime.Task, error) {
	if err := f.node.fault("find", id); err != nil {
		return nil, fmt.Errorf("find %s: %w", id, err)
	}
	f.node.mu.Lock()
	defer f.node.mu.Unlock()
	t := f.node.tasks[id]
	if t == nil {
		return nil, fmt.Errorf("find %s: %w", id, runtime.ErrNotFound)
	}
	return &handle{f: f, fakeTask: t}, nil
}

// Remove ends and drops a task.
func (f *Fake) Remove(_ context.Context, id string) error {
	n := f.node
	if err := n.fault("remove:task", id); err != nil {
		return fmt.Errorf("remove %s: %w", id, err)
	}
	n.mu.Lock()
	t := n.tasks[id]
	if t != nil {
		n.half[id] = true
		delete(n.tasks, id)
	}
	n.mu.Unlock()
	if t != nil {
		t.end()
	}
	for _, step := range []string{"remove:container", "remove:snapshot"} {
		if err := n.fault(step, id); err != nil {
			return fmt.Errorf("remove %s: %w", id, err)
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.half, id)
	return nil
}

// List answers the ids of tasks and leftovers.
func (f *Fake) List(context.Context) ([]string, error) {
	if err := f.node.fault("list", ""); err != nil {
		return nil, err
	}
	f.node.mu.Lock()
	defer f.node.mu.Unlock()
	var ids []string
	for id := range f.node.tasks {
		ids = append(ids, id)
	}
	for id := range f.node.half {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids, nil
}

// Image looks a name up: as given, then as Docker completes it.
func (f *Fake) Image(_ context.Context, ref string) (runtime.Image, error) {
	if err := f.node.fault("image", ref); err != nil {
		return runtime.Image{}, err
	}
	f.node.mu.Lock()
	defer f.node.mu.Unlock()
	for _, name := range []string{ref, complete(ref)} {
		if img, ok := f.node.images[name]; ok {
			return img, nil
		}
	}
	return runtime.Image{}, fmt.Errorf("%w: %s", runtime.ErrImageNotFound, ref)
}

// complete adds registry, library and tag.
func complete(ref string) string {
	if !strings.Contains(ref, "/") {
		ref = "docker.io/library/" + ref
	}
	if !strings.Contains(ref[strings.LastIndexByte(ref, '/'):], ":") {
		ref += ":latest"
	}
	return ref
}

// Images answers all images.
func (f *Fake) Images(context.Context) ([]runtime.Image, error) {
	if err := f.node.fault("images", ""); err != nil {
		return nil, err
	}
	f.node.mu.Lock()
	defer f.node.mu.Unlock()
	var out []runtime.Image
	for _, img := range f.node.images {
		out = append(out, img)
	}
	slices.SortFunc(out, func(a, b runtime.Image) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// Import reads an OCI archive.
func (f *Fake) Import(ctx context.Context, r io.Reader) ([]runtime.Image, error) {
	if err := f.node.fault("import", ""); err != nil {
		return nil, err
	}
	src := &source{r: r}
	found, err := readArchive(src)
	if src.err != nil {
		return nil, fmt.Errorf("import images: %w", src.err)
	}
	if err != nil {
		return nil, fmt.Errorf("import images: %w: %w", runtime.ErrInvalidArchive, err)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f.node.mu.Lock()
	defer f.node.mu.Unlock()
	for _, img := range found {
		f.node.images[img.Name] = img
	}
	return found, nil
}

// source remembers that it was the reader that failed.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// Pull has no registry: it finds what AddImage or Import have put there.
func (f *Fake) Pull(ctx context.Context, ref string, _ bool) (runtime.Image, error) {
	if err := f.node.fault("pull", ref); err != nil {
		return runtime.Image{}, err
	}
	return f.Image(ctx, complete(ref))
}

func validate(s runtime.Spec) error {
	bad := s.ID == "" || strings.Trim(s.ID, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" ||
		s.CgroupPath == "" || strings.HasPrefix(s.CgroupPath, "/") || strings.Contains(s.CgroupPath, "..") ||
		!strings.HasPrefix(s.LogDir, "/") || s.CPUMillis < 0 || s.MemoryBytes < 0 || s.PIDs < 0 ||
		slices.ContainsFunc(s.Env, func(kv string) bool { return strings.IndexByte(kv, '=') < 1 })
	if bad {
		return runtime.ErrInvalidSpec
	}
	return nil
}
