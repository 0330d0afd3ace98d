// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"

	"github.com/bulkheadhq/bulkhead/runtime"
)

// How a name finds an image: as it is given; then as Docker completes it
// (busybox is docker.io/library/busybox:latest). Pull asks a registry and
// therefore always completes it. Import stores the names that an archive gives,
// completed if they are Docker's; an image without a name is stored, and found,
// by its digest.

// imageInfo is what Create needs of an image for this platform. It belongs to a
// digest and never changes.
type imageInfo struct {
	name       string
	target     ocispec.Descriptor
	chainID    string // of the unpacked layers
	entrypoint []string
	cmd        []string
	env        []string
	workdir    string
	user       string
	sizeBytes  int64
}

// imageCache keeps what the content store says of digests. Names are looked up
// every time.
type imageCache struct {
	mu   sync.Mutex
	seen map[digest.Digest]imageInfo
}

// Image answers the image that a name means.
func (r *Runtime) Image(ctx context.Context, ref string) (runtime.Image, error) {
	ctx, cancel := r.bound(ctx)
	defer cancel()
	img, err := r.findImage(ctx, ref)
	if err != nil {
		return runtime.Image{}, err
	}
	return r.describe(ctx, img)
}

// Images answers all images of the namespace, sorted by name.
func (r *Runtime) Images(ctx context.Context) ([]runtime.Image, error) {
	ctx, cancel := r.bound(ctx)
	defer cancel()
	list, err := r.client.ImageService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	out := make([]runtime.Image, 0, len(list))
	for _, img := range list {
		d, err := r.describe(ctx, img)
		if err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b runtime.Image) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

func (r *Runtime) describe(ctx context.Context, img images.Image) (runtime.Image, error) {
	out := runtime.Image{Name: img.Name, Digest: img.Target.Digest.String(), SizeBytes: -1, Created: img.CreatedAt}
	info, err := r.inspect(ctx, img)
	switch {
	case err == nil:
		out.SizeBytes = info.sizeBytes
	case !errors.Is(err, runtime.ErrImageNotFound):
		return runtime.Image{}, err
	}
	return out, nil
}

// findImage looks a name up in the store.
func (r *Runtime) findImage(ctx context.Context, ref string) (images.Image, error) {
	names := []string{ref}
	if full, err := completeRef(ref); err == nil && full != ref {
		names = append(names, full)
	}
	for _, name := range names {
		img, err := r.client.ImageService().Get(ctx, name)
		if err == nil {
			return img, nil
		}
		if !isNotFound(err) && !errdefs.IsInvalidArgument(err) {
			return images.Image{}, fmt.Errorf("look up image %s: %w", ref, err)
		}
	}
	return images.Image{}, fmt.Errorf("%w: %s", runtime.ErrImageNotFound, ref)
}

// completeRef adds what Docker takes for granted in a name.
func completeRef(ref string) (string, error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return "", fmt.Errorf("image name %q: %w", ref, err)
	}
	return named.String(), nil
}

// imageInfo answers what a name means for this platform.
func (r *Runtime) imageInfo(ctx context.Context, ref string) (imageInfo, error) {
	ctx, cancel := r.bound(ctx)
	defer cancel()
	img, err := r.findImage(ctx, ref)
	if err != nil {
		return imageInfo{}, err
	}
	return r.inspect(ctx, img)
}

// inspect reads manifest and config. runtime.ErrImageNotFound if the image is
// not for this platform, or not whole.
func (r *Runtime) inspect(ctx context.Context, img images.Image) (imageInfo, error) {
	c := &r.images
	c.mu.Lock()
	info, ok := c.seen[img.Target.Digest]
	c.mu.Unlock()
	info.name = img.Name
	if ok {
		return info, nil
	}
	info, err := r.readImage(ctx, img.Target)
	if isNotFound(err) {
		return imageInfo{}, fmt.Errorf("%w: %s has nothing for %s: %w", runtime.ErrImageNotFound, img.Name, platforms.DefaultString(), err)
	}
	if err != nil {
		return imageInfo{}, fmt.Errorf("inspect image %s: %w", img.Name, err)
	}
	c.mu.Lock()
	if c.seen == nil || len(c.seen) >= maxCached {
		c.seen = map[digest.Digest]imageInfo{}
	}
	c.seen[img.Target.Digest] = info
	c.mu.Unlock()
	info.name = img.Name
	return info, nil
}

func (r *Runtime) readImage(ctx context.Context, target ocispec.Descriptor) (imageInfo, error) {
	store := r.client.ContentStore()
	manifest, err := images.Manifest(ctx, store, target, platforms.Default())
	if err != nil {
		return imageInfo{}, err
	}
	b, err := content.ReadBlob(ctx, store, manifest.Config)
	if err != nil {
		return imageInfo{}, err
	}
	var config ocispec.Image
	if err := json.Unmarshal(b, &config); err != nil {
		return imageInfo{}, fmt.Errorf("decode config: %w", err)
	}
	info := imageInfo{
		target:     target,
		chainID:    identity.ChainID(config.RootFS.DiffIDs).String(),
		entrypoint: config.Config.Entrypoint,
		cmd:        config.Config.Cmd,
		env:        config.Config.Env,
		workdir:    config.Config.WorkingDir,
		user:       config.Config.User,
		sizeBytes:  manifest.Config.Size,
	}
	for _, l := range manifest.Layers {
		info.sizeBytes += l.Size
	}
	return info, nil
}

// unpack makes snapshots of an image's layers. It may take as long as it takes,
// and may be broken off and begun again.
func (r *Runtime) unpack(ctx context.Context, image imageInfo) error {
	img := client.NewImage(r.client, images.Image{Name: image.name, Target: image.target})
	if err := img.Unpack(ctx, r.cfg.Snapshotter); err != nil {
		return fmt.Errorf("unpack image %s: %w", image.name, err)
	}
	return nil
}

// leased runs f with everything it stores protected from the garbage collector.
// When f fails, what it stored is gone when leased returns.
func (r *Runtime) leased(ctx context.Context, f func(context.Context) error) (err error) {
	ls := r.client.LeasesService()
	lease, err := ls.Create(ctx, leases.WithRandomID(), leases.WithExpiration(24*time.Hour))
	if err != nil {
		return fmt.Errorf("make lease: %w", err)
	}
	defer func() {
		dctx, cancel := r.finish(ctx)
		defer cancel()
		var opts []leases.DeleteOpt
		if err != nil {
			opts = append(opts, leases.SynchronousDelete)
		}
		if derr := ls.Delete(dctx, lease, opts...); derr != nil {
			err = errors.Join(err, fmt.Errorf("delete lease: %w", derr))
		}
	}()
	// containerd's libraries log what they also answer as errors.
	return f(log.WithLogger(leases.WithLease(ctx, lease.ID), quiet))
}

// quiet drops what it is told.
var quiet = func() *log.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return logrus.NewEntry(l)
}()

// Pull fetches an image from its registry and unpacks it.
func (r *Runtime) Pull(ctx context.Context, ref string, plainHTTP bool) (runtime.Image, error) {
	name, err := completeRef(ref)
	if err != nil {
		return runtime.Image{}, fmt.Errorf("pull: %w", err)
	}
	match := func(string) (bool, error) { return plainHTTP, nil }
	resolver := docker.NewResolver(docker.ResolverOptions{
		Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(match)),
	})
	var img client.Image
	err = r.leased(ctx, func(ctx context.Context) error {
		var err error
		img, err = r.client.Pull(ctx, name,
			client.WithResolver(resolver),
			client.WithPullSnapshotter(r.cfg.Snapshotter),
			client.WithPullUnpack)
		return err
	})
	if isNotFound(err) {
		err = fmt.Errorf("%w: %w", runtime.ErrImageNotFound, err)
	}
	if err != nil {
		return runtime.Image{}, fmt.Errorf("pull %s: %w", name, err)
	}
	return r.describe(ctx, img.Metadata())
}
