// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/bulkheadhq/bulkhead/runtime"
)

// gzipMagic begins every gzip stream.
var gzipMagic = []byte{0x1f, 0x8b}

// Import reads an archive, unpacks what it holds for this platform and only
// then gives the images their names: an archive that turns out bad in its last
// byte leaves nothing and changes no name.
func (r *Runtime) Import(ctx context.Context, in io.Reader) ([]runtime.Image, error) {
	src := &source{r: in}
	var named []images.Image
	err := r.leased(ctx, func(ctx context.Context) error {
		found, err := r.ingest(ctx, src)
		if err != nil {
			return err
		}
		for _, img := range found {
			info, err := r.inspect(ctx, img)
			if err != nil {
				return err
			}
			if err := r.unpack(ctx, info); err != nil {
				return err
			}
		}
		for _, img := range found {
			stored, err := r.setImage(ctx, img)
			if err != nil {
				return storeError{err}
			}
			named = append(named, stored)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("import images: %w", importError(ctx, src, err))
	}
	out := make([]runtime.Image, 0, len(named))
	for _, img := range named {
		d, err := r.describe(ctx, img)
		if err != nil {
			return nil, fmt.Errorf("import images: %w", err)
		}
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b runtime.Image) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// source remembers whether it was the reader that failed, or what was read.
type source struct {
	r   io.Reader
	err error // of the reader itself; not the end
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// storeError is an error of storing, which no archive is to blame for.
type storeError struct{ error }

func (e storeError) Unwrap() error { return e.error }

// importError says whose fault it was.
func importError(ctx context.Context, src *source, err error) error {
	var store storeError
	switch {
	case src.err != nil:
		return src.err
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &store), isUnavailable(err), errdefs.IsResourceExhausted(err),
		strings.Contains(err.Error(), "no space left on device"):
		return err
	}
	return fmt.Errorf("%w: %w", runtime.ErrInvalidArchive, err)
}

// ingest stores the blobs and answers the images for this platform, unnamed in
// the store as yet.
func (r *Runtime) ingest(ctx context.Context, src io.Reader) ([]images.Image, error) {
	br := bufio.NewReaderSize(src, 64<<10)
	var in io.Reader = br
	if head, err := br.Peek(len(gzipMagic)); err == nil && bytes.Equal(head, gzipMagic) {
		zr, err := gzip.NewReader(br)
		if err != nil {
			return nil, fmt.Errorf("gzip: %w", err)
		}
		in = zr
	}
	store := r.client.ContentStore()
	index, err := archive.ImportIndex(ctx, store, in)
	if err != nil {
		return nil, err
	}
	// The tar ends before the stream; gzip has its checksum at the very end.
	if _, err := io.Copy(io.Discard, in); err != nil {
		return nil, err
	}
	found, err := r.archiveImages(ctx, index)
	if err != nil {
		return nil, err
	}
	// Everything that the images need must be there, and lives as long as they.
	handler := images.SetChildrenLabels(store, images.FilterPlatforms(images.ChildrenHandler(store), platforms.Default()))
	for _, img := range found {
		if err := images.WalkNotEmpty(ctx, handler, img.Target); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// archiveImages reads the index of an archive.
func (r *Runtime) archiveImages(ctx context.Context, desc ocispec.Descriptor) ([]images.Image, error) {
	b, err := content.ReadBlob(ctx, r.client.ContentStore(), desc)
	if err != nil {
		return nil, err
	}
	var index ocispec.Index
	if err := json.Unmarshal(b, &index); err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	var found []images.Image
	for _, m := range index.Manifests {
		if !images.IsManifestType(m.MediaType) && !images.IsIndexType(m.MediaType) {
			continue
		}
		if m.Platform != nil && !platforms.Default().Match(*m.Platform) {
			continue
		}
		found = append(found, images.Image{Name: archiveName(m), Target: m})
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("no image for %s in it", platforms.DefaultString())
	}
	return found, nil
}

// archiveName is the name that an archive gives an image. A bare tag, which some
// tools write in its place, names nothing.
func archiveName(m ocispec.Descriptor) string {
	name := m.Annotations[images.AnnotationImageName]
	if name == "" {
		name = m.Annotations[ocispec.AnnotationRefName]
		if !strings.ContainsAny(name, "/:") {
			name = ""
		}
	}
	if name == "" {
		return m.Digest.String()
	}
	return name
}

// setImage gives an image its name; whatever had it loses it.
func (r *Runtime) setImage(ctx context.Context, img images.Image) (images.Image, error) {
	is := r.client.ImageService()
	stored, err := is.Update(ctx, img, "target")
	if isNotFound(err) {
		stored, err = is.Create(ctx, img)
	}
	if isExists(err) {
		// Somebody else was quicker to give the name; the last one has it.
		stored, err = is.Update(ctx, img, "target")
	}
	if err != nil {
		return images.Image{}, fmt.Errorf("name image %s: %w", img.Name, err)
	}
	return stored, nil
}
